"""Programs in processes of their own that begin with the large libraries imported: one process imports them, a fork of it runs each.

Importing torch, PEFT and transformers takes five seconds, and what is asked of a program is mostly done in less than one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import importlib, json, os, sys, traceback
for name in sys.argv[1:]:
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.chdir(job["folder"])
            exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Running:
    """A program that has begun: it gets signals by its number, ``process``."""

    process: int
    server: subprocess.Popen[str]
    said: Path

    def wait(self) -> tuple[int, str]:
        """Its exit status, less than 0 where a signal ended it, and what it said."""
        return _number(self.server), self.said.read_text()


class Forked:
    """``run(program, folder)``: the exit status of a program that ran in that folder, and what it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, program: str, folder: Path) -> tuple[int, str]:
        return self.start(program, folder).wait()

    def start(self, program: str, folder: Path) -> Running:
        """Without waiting for it; the next one begins when this one has ended, and must be started when it was waited for."""
        said = folder / "said.txt"
        assert self._process.stdin is not None
        job = {"program": program, "folder": str(folder), "said": str(said)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Running(_number(self._process), self._process, said)


def _number(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, "the process that forks has ended"
    return int(line)


@contextmanager
def forking(
    *modules: str, options: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Forked]:
    """A process with these modules imported, until the end of the block. ``options`` are the interpreter's."""
    assert hasattr(os, "fork")
    process = subprocess.Popen(
        [sys.executable, *options, "-c", SERVER, *modules],
        env=environment,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield Forked(process)
    finally:
        process.kill()
        process.communicate()
