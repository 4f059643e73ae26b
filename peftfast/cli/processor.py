"""What results call the processor that they were measured on."""

import platform
import re
from pathlib import Path

# Linux gives an ARM core by numbers: the part numbers of its designer (implementer 0x41), as lscpu names them.
ARM_PARTS = {
    0xD08: "Cortex-A72",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD40: "Neoverse-V1",
    0xD42: "Cortex-A78AE",
    0xD49: "Neoverse-N2",
    0xD4F: "Neoverse-V2",
    0xD83: "Neoverse-V3AE",
    0xD84: "Neoverse-V3",
    0xD85: "Cortex-X925",
    0xD87: "Cortex-A725",
    0xD8E: "Neoverse-N3",
}


def _core(implementer: str, part: str) -> str:
    known = ARM_PARTS.get(int(part, 16)) if int(implementer, 16) == 0x41 else None
    return f"ARM {known}" if known else f"ARM implementer {implementer} part {part}"


def _x86(core: dict[str, str]) -> str:
    """A virtual machine may say no more than the maker ("AMD EPYC"): the family and the model then tell the generation."""
    name = core["model name"]
    if re.search(r"\d", name) or not core.get("cpu family") or not core.get("model"):
        return name
    return f"{name} (family {core['cpu family']}, model {core['model']})"


def name_from(cpuinfo: str) -> str | None:
    """What the text of /proc/cpuinfo calls the processor; of several kinds of cores each once, in their order. None where it does not
    say."""
    cores: list[dict[str, str]] = []
    for block in cpuinfo.split("\n\n"):
        fields = (line.partition(":") for line in block.splitlines())
        cores.append({key.strip(): value.strip() for key, _, value in fields})
    for core in cores:
        if core.get("model name"):
            return _x86(core)
    try:
        names = [_core(core["CPU implementer"], core["CPU part"]) for core in cores if "CPU part" in core]
    except (KeyError, ValueError):
        return None
    return ", ".join(dict.fromkeys(names)) or None


def processor_name() -> str:
    try:
        name = name_from(Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name or platform.processor() or platform.machine()
