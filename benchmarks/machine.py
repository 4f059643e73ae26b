"""What a result must say of its origin: the commit, the versions, the device with driver and clocks, the load beside it."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("peftfast", "torch", "triton", "peft", "bitsandbytes", "transformers", "numpy")
ROOT = Path(__file__).resolve().parents[1]
COMMIT_VARIABLE = "PEFTFAST_COMMIT"  # for a copy of the tree that has no repository beside it


def _output(*command: str, cwd: Path | None = None) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> dict[str, Any]:
    """The revision that peftfast was imported from, and whether the tree differed from it."""
    import peftfast

    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        return {"commit": named, "dirty": False}
    root = Path(peftfast.__file__).resolve().parents[1]
    if Path(_output("git", "rev-parse", "--show-toplevel", cwd=root) or "/nowhere") != root:
        return {"commit": None, "dirty": False}
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=root)
    return {"commit": _output("git", "rev-parse", "HEAD", cwd=root) or None, "dirty": bool(changed)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        from peftfast.cli.processor import processor_name
    except ImportError:  # compare measures an older peftfast with this file
        return platform.processor() or platform.machine()
    return processor_name()


def _cuda(device: str) -> dict[str, Any]:
    index = torch.device(device).index or 0
    properties = torch.cuda.get_device_properties(index)
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    # NVML counts all devices, torch the visible ones: the uuid names the same in both.
    asked = _output("nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={fields}", "--format=csv,noheader")
    values = [value.strip() for value in asked.split(",")] if asked else []
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        **dict(zip(fields.split(","), values, strict=False)),
    }


def _cpu_isa() -> str | None:
    try:
        from peftfast.ops import native

        return native.cpu_isa() if native.cpu_available()[0] else None
    except (ImportError, AttributeError):
        return None


def load_average() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe(device: str, threads: int) -> dict[str, Any]:
    cpu = {"name": _cpu_name(), "threads": threads, "cores": os.cpu_count(), "isa": _cpu_isa()}
    return {
        **commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "device": device,
        "cpu": cpu,
        "gpu": _cuda(device) if device.startswith("cuda") else None,
        "load_at_start": load_average(),
    }


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a run that is stopped while it writes leaves the older file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def slug(description: dict[str, Any]) -> str:
    """The folder of a device's results."""
    cpu = description["cpu"]
    name = description["gpu"]["name"] if description["gpu"] else f"{cpu['name']}-{cpu['isa']}-{cpu['threads']}threads"
    name += "-warm" if description.get("warm") else ""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
