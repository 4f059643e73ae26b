"""Fill the tables of shapes at which a product kernel takes the library's place: ``python -m benchmarks.product --shapes 4096 8192
--tokens 2048 8192 --write``, and with ``--table nf4_product`` those of 4-bit weights.

Measures a table's operators by ``benchmarks.run`` (with ``--from`` takes rows that were measured before, such as ``make gpu`` leaves in
product.json and nf4_product.json) and prints, for each case, the bare library product, what is taken without a table, and the best
candidate. ``lora_product`` keeps a case where the candidate, adapter included, reaches ``--share`` of the speed of the bare product,
and is faster than the product and a pass; ``nf4_product`` where the candidate, a kernel or another way, is ``--gain`` times as fast as
what is taken without it. No candidate counts that is over its error budget. ``--write`` puts what is kept into
``peftfast/configs/<gpu>.json`` and takes out what is not; cases that were not measured stay as they are.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftfast.configs import lora_product as configs
from peftfast.configs import nf4_product as nf4_configs
from peftfast.configs.device import Device

from . import machine, run, table
from .registry import Case

FOLDER = Path(configs.__file__).parent
SAME = ("op", "shape", "m", "n", "k", "rank", "dtype", "dropout")


@dataclass(frozen=True)
class Standards:
    """What a candidate must reach: ``share`` of the bare product's speed, or ``gain`` times that of what is taken without a table."""

    share: float = configs.KEPT_FROM
    gain: float = nf4_configs.KEPT_FROM


@dataclass(frozen=True)
class Verdict:
    """One case: seconds of the bare product, of what is taken without a table and of the best candidate, that candidate's provider, and
    what becomes of it. ``key`` is None where the table has no such case."""

    table: str
    title: str
    key: str | None
    frozen: float
    library: float
    best: float
    candidate: str
    config: Any
    kept: bool
    reason: str

    @property
    def share(self) -> float:
        return self.frozen / self.best


@dataclass(frozen=True)
class Table:
    """One operator's entries in a device's table.

    Attributes:
        ops: what measures them -> whether it is the forward, else dX.
        candidates: (row, device, forward) -> provider -> its entry. usual: what is taken without one; the first that was measured.
        key: (row, forward) -> the entry's key. refusal: why the best candidate is not kept, or nothing.
        found: (config, best, frozen, usual) -> the entry with what was measured.
        rows, ranks: for which the table has entries. defaults: options of ``benchmarks.run`` where none are given.
    """

    name: str
    ops: dict[str, bool]
    candidates: Callable[[dict[str, Any], Device, bool], dict[str, Any]]
    usual: tuple[str, ...]
    key: Callable[[dict[str, Any], bool], str]
    refusal: Callable[[dict[str, Any], Device, float, float, float, Standards], str]
    found: Callable[[Any, float, float, float], Any]
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]


def _by_descriptors(row: dict[str, Any], device: Device) -> bool:
    return device.capability >= (9, 0) and row["n"] % 8 == 0 and row["k"] % 8 == 0


def _lora_candidates(row: dict[str, Any], device: Device, forward: bool) -> dict[str, Any]:
    found = configs.candidates(row["rank"], row["dtype"], _by_descriptors(row, device), device)
    return {f"peftfast:product {i}": config for i, config in enumerate(found, 1)}


def _lora_key(row: dict[str, Any], forward: bool) -> str:
    n, k = (row["n"], row["k"]) if forward else (row["k"], row["n"])
    return configs.case(row["m"], n, k, row["rank"], row["dtype"], forward, bool(row["dropout"])).key


def _lora_refusal(
    row: dict[str, Any], device: Device, best: float, frozen: float, library: float, standards: Standards
) -> str:
    if frozen / best < standards.share:
        return f"below {100 * standards.share:.0f} % of the bare product"
    if best >= library:
        return "the product and a pass are as fast"
    return "" if _by_descriptors(row, device) else "the table is for tiles that the copy engine moves"


def _nf4_candidates(row: dict[str, Any], device: Device, forward: bool) -> dict[str, Any]:
    from . import nf4_product  # registers operators, which the registry does in its own order

    case = Case(**{field.name: row.get(field.name) for field in dataclasses.fields(Case)})  # type: ignore[arg-type]
    return nf4_product.candidates(case, device, not forward)


def _nf4_key(row: dict[str, Any], forward: bool) -> str:
    # The benchmark's weights are in blocks of 64, nested.
    sizes = (row["m"], row["n"], row["k"], row["rank"], row["dtype"])
    return nf4_configs.case(*sizes, 64, True, not forward, bool(row["dropout"])).key


def _nf4_refusal(
    row: dict[str, Any], device: Device, best: float, frozen: float, usual: float, standards: Standards
) -> str:
    return "" if usual / best >= standards.gain else f"not {standards.gain:g} times as fast as without"


TABLES = (
    Table(
        "lora_product",
        {"lora_product": True, "lora_product_dx": False},
        _lora_candidates,
        ("peftfast:library",),
        _lora_key,
        _lora_refusal,
        lambda config, best, frozen, _: dataclasses.replace(config, share=round(frozen / best, 4)),
        configs.ROW_BUCKETS,
        configs.RANK_BUCKETS,
        (2048, 8192),
    ),
    Table(
        "nf4_product",
        {"nf4_product": True, "nf4_product_dx": False},
        _nf4_candidates,
        ("peftfast:few rows", "peftfast:dequantize"),
        _nf4_key,
        _nf4_refusal,
        lambda config, best, _, usual: dataclasses.replace(config, gain=round(usual / best, 4)),
        nf4_configs.ROW_BUCKETS,
        configs.RANK_BUCKETS,
        nf4_configs.ROW_BUCKETS,
    ),
)
OPS = {op: one for one in TABLES for op in one.ops}


def _device(report: dict[str, Any]) -> Device:
    gpu = report["machine"]["gpu"]
    major, minor = (int(part) for part in str(gpu["capability"]).split("."))
    return Device(gpu["name"], (major, minor), gpu["multiprocessors"])


def _times(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Provider -> median, of those within their error budget."""
    return {row["provider"]: row["p50"] for row in rows if row["within_budget"] and row["p50"]}


def verdicts(report: dict[str, Any], standards: Standards = Standards()) -> Iterator[Verdict]:
    """What becomes of each case of a run's report."""
    device = _device(report)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row["op"] in OPS:
            groups.setdefault(tuple(row[name] for name in SAME), []).append(row)
    for rows in groups.values():
        times, row, kind = _times(rows), rows[0], OPS[rows[0]["op"]]
        forward = kind.ops[row["op"]]
        candidates = kind.candidates(row, device, forward)
        measured = {name: times[name] for name in candidates if name in times}
        usual = next((times[name] for name in kind.usual if name in times), None)
        if not measured or "frozen" not in times or usual is None:
            continue
        name = min(measured, key=lambda one: measured[one])
        best, frozen = measured[name], times["frozen"]
        reason = kind.refusal(row, device, best, frozen, usual, standards)
        if not reason and row["m"] not in kind.rows:
            reason = f"the table knows {', '.join(map(str, kind.rows))} rows"
        if not reason and row["rank"] not in kind.ranks:
            reason = f"the table knows the ranks {', '.join(map(str, kind.ranks))}"
        key = kind.key(row, forward) if row["m"] in kind.rows and row["rank"] in kind.ranks else None
        config = kind.found(candidates[name], best, frozen, usual)
        title, name = table.title(row), name.removeprefix("peftfast:")
        yield Verdict(kind.name, title, key, frozen, usual, best, name, config, not reason, reason)


def text(found: Sequence[Verdict]) -> str:
    header = ("case", "bare product", "without a table", "best", "candidate", "of bare", "kept")
    lines = [
        (
            one.title,
            *(table.time(seconds) for seconds in (one.frozen, one.library, one.best)),
            one.candidate,
            f"{100 * one.share:.1f} %",
            "yes" if one.kept else f"no: {one.reason}",
        )
        for one in found
    ]
    return table.aligned(header, lines)


def renew(path: Path, found: Sequence[Verdict]) -> tuple[int, int]:
    """Write what is kept into a device's table and take out what is not; how many entries were set and removed. Where nothing is left
    of a table there is no file."""
    tables = json.loads(path.read_text()) if path.is_file() else {}
    kept = gone = 0
    for one in found:
        entries = tables.setdefault(one.table, {})
        if one.kept and one.key:
            entries[one.key] = dataclasses.asdict(one.config)
            kept += 1
        elif one.key in entries:
            del entries[one.key]
            gone += 1
    for kind in TABLES:
        if not tables.get(kind.name, True):
            del tables[kind.name]
    if tables:
        machine.write_json(path, tables)
    else:
        path.unlink(missing_ok=True)
    return kept, gone


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog=f"python -m {__package__}.product",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="rows of a run that was made before"
    )
    parse.add_argument("--table", choices=[one.name for one in TABLES], default=TABLES[0].name)
    parse.add_argument("--shapes", nargs="+", default=["4096", "8192", "llama3-8b"])
    parse.add_argument("--tokens", nargs="+", type=int, help="the table's own if none are given")
    parse.add_argument("--rank", nargs="+", type=int, default=[16])
    parse.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    parse.add_argument("--dtype", nargs="+", choices=tuple(run.DTYPES), default=["bf16"])
    parse.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parse.add_argument("--seconds", type=float, default=0.2, help="spent on one row")
    parse.add_argument("--limit", type=float, metavar="SECONDS", help="begin no case after so many; the rows are kept")
    parse.add_argument("--share", type=float, default=Standards.share, help="of the bare product's speed")
    parse.add_argument("--gain", type=float, default=Standards.gain, help="over what is taken without a table")
    parse.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows and where they come from")
    parse.add_argument("--write", action="store_true", help="renew the GPU's table")
    parse.add_argument("--configs", type=Path, default=FOLDER, help="where the tables lie")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: that of ``benchmarks.run``; 2 for bad arguments."""
    parse = parser()
    args = parse.parse_args(argv)
    status = 0
    if args.source is not None:
        if not args.source.is_file():
            parse.error(f"--from: nothing at {args.source}")
        report = json.loads(args.source.read_text())
    else:
        kind = next(one for one in TABLES if one.name == args.table)
        args.tokens = args.tokens or kind.tokens
        words = ["--op", *kind.ops, "--device", args.device, "--seconds", str(args.seconds)]
        words += ["--limit", str(args.limit)] if args.limit is not None else []
        for name in ("shapes", "tokens", "rank", "dropout", "dtype"):
            words += [f"--{name}", *map(str, getattr(args, name))]
        with tempfile.TemporaryDirectory() as folder:
            out = args.out or Path(folder) / "rows.json"
            status = run.main([*words, "--out", str(out)])
            report = json.loads(out.read_text())
    if not isinstance(report, dict) or not report.get("machine", {}).get("gpu"):
        print("no rows of a GPU: a table is a GPU's", file=sys.stderr)
        return 2 if args.write else status
    found = list(verdicts(report, Standards(args.share, args.gain)))
    print(
        f"\n{text(found)}"
        if found
        else "\nno case has rows of a candidate, of the bare product and of what is taken without a table"
    )
    path = args.configs / f"{_device(report).slug}.json"
    if args.write:
        kept, gone = renew(path, found)
        print(f"{path}: {kept} entries written, {gone} taken out")
    elif kept := sum(one.kept for one in found):
        print(f"{kept} cases would be kept: --write puts them into {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
