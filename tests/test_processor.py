"""The processor's name, from what Linux writes on each architecture."""

import pytest

from benchmarks import machine
from peftfast.cli import processor

X86 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9V74\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 9V74\n"


def hidden(family: int, model: int, name: str = "AMD EPYC") -> str:
    """As a virtual machine says it."""
    return f"processor\t: 0\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"


def arm(*cores: tuple[str, str]) -> str:
    return "\n".join(
        f"processor\t: {i}\nFeatures\t: fp asimd\nCPU implementer\t: {implementer}\nCPU part\t: {part}\nCPU revision\t: 0\n"
        for i, (implementer, part) in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (X86, "AMD EPYC 9V74"),
        (hidden(25, 17, "AMD EPYC 9V74"), "AMD EPYC 9V74"),
        (hidden(25, 17), "AMD EPYC (family 25, model 17)"),
        (hidden(6, 143, "Intel(R) Xeon(R) Processor"), "Intel(R) Xeon(R) Processor (family 6, model 143)"),
        ("model name\t: AMD EPYC\n", "AMD EPYC"),
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


@pytest.mark.parametrize(
    "machines", [(arm(("0x41", "0xd0c")), arm(("0x41", "0xd4f"))), (hidden(25, 17), hidden(26, 2))], ids=["ARM", "x86"]
)
def test_two_machines_do_not_share_a_folder_of_results(
    machines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = set()
    for cpuinfo in machines:
        monkeypatch.setattr(processor, "processor_name", lambda cpuinfo=cpuinfo: processor.name_from(cpuinfo))
        folders.add(machine.slug({"gpu": None, **machine.describe("cpu", 2)}))
    assert len(folders) == 2
