"""The processor's name, from what Linux writes on each architecture."""

import pytest

from benchmarks import machine
from peftfast.cli import processor

X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9V74\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 9V74\n"


def arm(*cores: tuple[str, str]) -> str:
    return "\n".join(
        f"processor\t: {i}\nFeatures\t: fp asimd\nCPU implementer\t: {implementer}\nCPU part\t: {part}\nCPU revision\t: 0\n"
        for i, (implementer, part) in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (X86, "AMD EPYC 9V74"),
        (arm(("0x41", "0xd4f"), ("0x41", "0xd4f")), "ARM Neoverse-V2"),
        (arm(("0x41", "0xd87"), ("0x41", "0xd85"), ("0x41", "0xd87")), "ARM Cortex-A725, ARM Cortex-X925"),
        (arm(("0xc0", "0xac3")), "ARM implementer 0xc0 part 0xac3"),
        (arm(("0x41", "0x001")), "ARM implementer 0x41 part 0x001"),
        (arm(("0x41", "?")), None),
        ("CPU part\t: 0xd4f\n", None),
        ("", None),
    ],
)
def test_name(cpuinfo: str, name: str | None) -> None:
    assert processor.name_from(cpuinfo) == name


def test_two_arm_machines_do_not_share_a_folder_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = set()
    for part in ("0xd0c", "0xd4f"):
        monkeypatch.setattr(processor, "processor_name", lambda part=part: processor.name_from(arm(("0x41", part))))
        folders.add(machine.slug({"gpu": None, **machine.describe("cpu", 2)}))
    assert len(folders) == 2
