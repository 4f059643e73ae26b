"""Directories and files that are replaced whole: whoever looks finds the old one or the new one, never half of either.

A directory is written under a hidden sibling name and flushed to the disk, then put in place. Linux can exchange two names in one
step (renameat2), so the name never goes missing. Elsewhere two renames are needed, and a process killed between them leaves the
last directory whole under its ``.old`` name; :func:`recover` puts it back.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def _sibling(target: Path, kind: str, pid: int | str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{pid}")


def _siblings(target: Path, kind: str) -> list[tuple[Path, int]]:
    prefix = _sibling(target, kind, "").name
    if not target.parent.is_dir():
        return []
    found = [path for path in target.parent.iterdir() if path.name.startswith(prefix)]
    return [(path, int(path.name[len(prefix) :])) for path in found if path.name[len(prefix) :].isdigit()]


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(second))


def flush(path: Path) -> None:
    """Every file under ``path``, then the names that lead to them, on the disk: a rename that outlives its contents loses both."""
    for folder, _, names in os.walk(path, topdown=False):
        for entry in [*(os.path.join(folder, name) for name in names), folder]:
            _flush_one(entry)


def _flush_one(entry: str | Path) -> None:
    if os.name == "nt" and os.path.isdir(entry):
        return
    handle = os.open(entry, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(target: Path) -> bool:
    """Put back the directory that a killed process left under its ``.old`` name, and sweep up what dead processes left unfinished.

    Returns whether a directory was put back.
    """
    old = [path for path, _ in _siblings(target, "old")]
    restored = bool(old) and not target.exists()
    if restored:
        # Whatever process number the name bears, which the system may have given out anew: the directory is whole.
        os.rename(max(old, key=lambda path: path.stat().st_mtime_ns), target)
    _sweep(target)
    return restored


def _sweep(target: Path) -> None:
    for kind in ("old", "new", "dense"):
        for path, pid in _siblings(target, kind):
            if not _alive(pid):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


@contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """``with replace_directory(target) as new:`` fill ``new``; at the end it is ``target``, and what ``target`` was is gone.

    An exception inside leaves ``target`` as it was and removes ``new``. A kill at any moment leaves the last ``target`` whole, at
    worst under the name that :func:`recover` knows.

    Raises:
        NotADirectoryError: ``target`` exists and is not a directory.
    """
    target = Path(os.path.abspath(target))
    recover(target)
    if target.exists() and (target.is_symlink() or not target.is_dir()):
        raise NotADirectoryError(errno.ENOTDIR, "expected a directory that can be replaced", str(target))
    new, old = _sibling(target, "new", os.getpid()), _sibling(target, "old", os.getpid())
    try:
        new.mkdir(parents=True)
        yield new
        flush(new)
        if not target.exists():
            os.rename(new, target)
        elif not _exchange(new, target):
            os.rename(target, old)
            os.rename(new, target)
        _flush_one(target.parent)
        _remove(new, old)  # after an exchange the old directory bears the new one's hidden name
    except BaseException:  # Ctrl+C also while they are removed
        if old.exists() and not target.exists():
            os.rename(old, target)
        _remove(new, old)
        raise


@contextmanager
def beside(target: Path, kind: str) -> Iterator[Path]:
    """A folder for the time of the block, hidden beside ``target``; what a killed process leaves of it :func:`recover` sweeps up."""
    folder = _sibling(Path(os.path.abspath(target)), kind, os.getpid())
    _remove(folder)
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        _remove(folder)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def replace_file(target: Path, contents: bytes) -> None:
    """Write ``contents`` under a sibling name, flush it and rename it to ``target``."""
    target = Path(os.path.abspath(target))
    _sweep(target)
    new = _sibling(target, "new", os.getpid())
    try:
        with open(new, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
