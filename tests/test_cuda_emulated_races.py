"""No kernel of csrc/cuda depends on which of its threads comes first, and each barrier in it is one that it needs."""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import test_cuda_emulated as nf4
from tests import test_cuda_emulated_lora as lora
from tests import test_cuda_emulated_operators as other
from tests.support.cuda_emulator.build import CSRC, build, fails_apart

pytestmark = [pytest.mark.interpreter, pytest.mark.slow]

FAMILIES = ("lora", "nf4", "sparse", "zeroth_order")
Edit = tuple[str, str]


def barriers() -> Iterator[tuple[str, str, Edit]]:
    """The source of each, its line, and what takes it out."""
    for path in sorted((CSRC / "cuda").glob("*.cu")):
        lines = path.read_text().split("\n")
        for i, line in enumerate(lines):
            if re.search(r"\b__sync(threads|warp)\(\);", line):
                before, after = lines[i - 2 : i], lines[i + 1 : i + 3]
                without = re.sub(r"\b__sync(threads|warp)\(\);", "", line)
                edit = "\n".join((*before, line, *after)), "\n".join((*before, without, *after))
                yield path.stem, str(i + 1), edit


BARRIERS = list(barriers())


def checks(family: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[ctypes.CDLL], None]]:
    """By the part of a source's name that they run."""
    if family == "nf4":

        def quantize(library: ctypes.CDLL) -> None:
            nf4.check_quantize(library)
            nf4.check_nest(library)

        return {"nf4_linear": nf4.check_linear, "nf4_quantize": quantize, "nf4": nf4.check_dequantize}
    if family == "lora":
        return {"lora": lambda library: lora.check_shrink(library, 12)}

    def operators(names: tuple[str, ...]) -> Callable[[ctypes.CDLL], None]:
        def check(library: ctypes.CDLL) -> None:
            with other.operators_of({family: library}):
                for name in names:
                    other.CHECKS[name](monkeypatch)

        return check

    if family == "zeroth_order":
        return {"zeroth_order": operators(("zo", "pair"))}
    return {"sparse_adamw": operators(("adamw",)), "sparse_delta": operators(("dvalues",))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tmp_path_factory.mktemp(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def libraries(folders: dict[str, Path]) -> dict[str, ctypes.CDLL]:
    return {family: build(family, folder, races=True) for family, folder in folders.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_races(family: str, libraries: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, check in checks(family, monkeypatch).items():
        assert not fails_apart(lambda check=check: check(libraries[family])), name


@pytest.mark.planted
@pytest.mark.parametrize(("source", "line", "edit"), BARRIERS, ids=[f"{source}:{line}" for source, line, _ in BARRIERS])
def test_a_barrier_that_is_missing_is_found(
    source: str,
    line: str,
    edit: Edit,
    folders: dict[str, Path],
    libraries: dict[str, ctypes.CDLL],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = next(family for family in FAMILIES if source.startswith(family))
    faulty = build(family, tmp_path, edit, base=folders[family], races=True)
    assert fails_apart(lambda: checks(family, monkeypatch)[source](faulty))
