"""A run as its seeds: what the file holds, what comes back from it, and what happens to one that is torn."""

import copy
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftfast.optim import MeZO, replay
from peftfast.optim.seed_log import MAGIC, RECORD, read
from tests.support.lora_checks import BF16, DEVICE, F16, F32
from tests.support.mezo_checks import LABELS, TOKENS, Net, closure_of, net, same, state


def run(model: nn.Module, path: Path, steps: int = 5, **options: Any) -> MeZO:
    optimizer = MeZO(model, log=path, seed=3, **{"lr": 1e-2, "eps": 1e-2, **options})
    for _ in range(steps):
        optimizer.step(closure_of(model))
    optimizer.check()
    return optimizer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"distribution": "rademacher", "weight_decay": 0.1},
        {"directions": 3, "momentum": 0.5, "momentum_window": 2},
        {"density": 0.3},
        {"rank": 4, "directions": 2, "weight_decay": 0.1},
        {"clip": 0.5, "two_sided": False, "stochastic_rounding": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_replay_gives_the_same_bits(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = net(dtype)
    base = copy.deepcopy(model)
    optimizer = run(model, tmp_path / "log", **options)
    assert not same(model, state(base))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replay(tmp_path / "log", base) == 5
    assert same(base, state(model))
    size = (tmp_path / "log").stat().st_size - len(MAGIC) - 8 - header_size(tmp_path / "log")
    assert size == 16 * 5 * optimizer.directions


def header_size(path: Path) -> int:
    data = path.read_bytes()
    return struct.unpack("<q", data[len(MAGIC) : len(MAGIC) + 8])[0]


def test_a_part_of_a_run(tmp_path: Path) -> None:
    model = net()
    base, halfway = copy.deepcopy(model), copy.deepcopy(model)
    run(halfway, tmp_path / "half", steps=3)
    run(model, tmp_path / "log", steps=5)
    assert replay(tmp_path / "log", base, steps=3) == 3
    assert same(base, state(halfway))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's losses are read when they have come")
def test_a_step_is_in_the_file_when_it_is_done(tmp_path: Path) -> None:
    """A run that is killed between two steps has lost none of those it took."""
    model = net()
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, seed=3, log=tmp_path / "log")
    for step in range(3):
        optimizer.step(closure_of(model))
        assert len(list(read(tmp_path / "log")[1])) == step + 1


def test_the_header_names_what_was_trained(tmp_path: Path) -> None:
    model = net(BF16)
    optimizer = MeZO(model, seed=3, log=tmp_path / "log", filter=lambda name, _: "head" in name)
    header, steps = read(tmp_path / "log")
    names = [name for name, _ in model.named_parameters()]
    assert header["parameters"] == [
        {"name": "head.weight", "id": names.index("head.weight"), "shape": [5, 32], "dtype": "bfloat16"},
        {"name": "head.bias", "id": names.index("head.bias"), "shape": [5], "dtype": "bfloat16"},
    ]
    assert list(steps) == [] and optimizer.steps == 0


def test_ids_and_groups_come_back(tmp_path: Path) -> None:
    """Trained by a filter and in groups whose rates change: ids count all parameters, and a change of lr is in the log."""
    model = net()
    base = copy.deepcopy(model)
    groups = [
        {"params": [("first.weight", model.first.weight), ("norm.weight", model.norm.weight)], "lr": 1e-2},
        {"params": [("head.weight", model.head.weight)], "lr": 3e-2, "weight_decay": 0.2},
    ]
    optimizer = MeZO(groups, seed=3, eps=1e-2, log=tmp_path / "log", filter=lambda name, _: name != "norm.weight")
    for step in range(4):
        optimizer.step(closure_of(model))
        for group in optimizer.param_groups:
            group["lr"] *= 0.7 + 0.1 * step
    optimizer.check()
    assert replay(tmp_path / "log", base) == 4
    assert same(base, state(model))


def test_a_step_left_out_is_left_out_again(tmp_path: Path) -> None:
    model = net()
    base = copy.deepcopy(model)
    options: dict[str, Any] = {"momentum": 0.5, "momentum_window": 2, "weight_decay": 0.1}
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, seed=3, log=tmp_path / "log", **options)
    closure = closure_of(model)
    for bad in (False, True, False, False):
        for _ in range(2):
            try:
                optimizer.step(lambda bad=bad: closure() * (math.nan if bad else 1.0))  # type: ignore[misc]
            except ValueError:
                continue
            break
    with pytest.raises(ValueError):
        optimizer.step(lambda: closure() * math.nan)
        optimizer.check()
    assert replay(tmp_path / "log", base) == optimizer.steps
    assert same(base, state(model))


@pytest.mark.parametrize("cut", [1, 7, 15, 16, 17])
def test_a_torn_end_is_dropped_with_a_warning(cut: int, tmp_path: Path) -> None:
    model = net()
    base, four = copy.deepcopy(model), copy.deepcopy(model)
    run(model, tmp_path / "log", steps=5)
    run(four, tmp_path / "four", steps=4 if cut <= 16 else 3)
    data = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(data[:-cut])
    if cut == 16:  # between records nothing shows
        assert replay(tmp_path / "log", base) == 4
    else:
        with pytest.warns(RuntimeWarning, match="the last record is torn and was dropped"):
            assert replay(tmp_path / "log", base) == (4 if cut < 16 else 3)
    assert same(base, state(four))


@pytest.mark.parametrize("garbage", [b"\0" * 16, bytes(range(3, 19)), struct.pack("<qff", 9, math.nan, 1.0)])
def test_foreign_records_are_dropped(garbage: bytes, tmp_path: Path) -> None:
    """A file that was grown and never written: the seeds follow one another, so that what is no step is seen."""
    model = net()
    base = copy.deepcopy(model)
    run(model, tmp_path / "log", steps=2)
    with open(tmp_path / "log", "ab") as file:
        file.write(garbage)
    with pytest.warns(RuntimeWarning, match="torn"):
        assert replay(tmp_path / "log", base) == 2
    assert same(base, state(model))


def test_torn_between_the_directions_of_a_step(tmp_path: Path) -> None:
    model = net()
    base = copy.deepcopy(model)
    run(model, tmp_path / "log", steps=2, directions=2)
    data = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(data[: -RECORD.size])
    with pytest.warns(RuntimeWarning, match="torn"):
        assert replay(tmp_path / "log", base) == 1


def test_what_is_refused(tmp_path: Path) -> None:
    model = net()
    before = state(model)
    run(net(), tmp_path / "log", steps=1)
    with pytest.raises(ValueError, match="exists already"):
        MeZO(model, log=tmp_path / "log")
    for steps, error in ((-1, ValueError), (1.5, TypeError), ("x", TypeError), (True, TypeError)):
        with pytest.raises(error, match="^steps: expected an int"):
            replay(tmp_path / "log", model, steps=steps)
    assert replay(tmp_path / "log", model, steps=0) == 0
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="not a log"):
        replay(tmp_path / "text", model)
    (tmp_path / "torn").write_bytes((tmp_path / "log").read_bytes()[:40])
    with pytest.raises(ValueError, match="the header is torn"):
        replay(tmp_path / "torn", model)
    with pytest.raises(ValueError, match="params: no parameter gain"):
        replay(tmp_path / "log", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"gain: expected \[32\] float32"):
        replay(tmp_path / "log", net(BF16))
    run(net(), tmp_path / "inplace", steps=1, mode="inplace")
    with pytest.raises(ValueError, match="drifts"):
        replay(tmp_path / "inplace", model)
    assert same(model, before)


def test_bare_parameters_by_their_order(tmp_path: Path) -> None:
    theta = [torch.zeros(4, device=DEVICE), torch.zeros(3, device=DEVICE)]
    optimizer = MeZO(theta, lr=0.1, seed=5, log=tmp_path / "log")
    for _ in range(3):
        optimizer.step(lambda: sum((t - 1).square().sum() for t in theta))
    optimizer.check()
    base = [torch.zeros(4, device=DEVICE), torch.zeros(3, device=DEVICE)]
    replay(tmp_path / "log", base)
    assert all(torch.equal(a, b) for a, b in zip(base, theta, strict=True))


def test_a_checkpoint_is_the_base_and_the_log(tmp_path: Path) -> None:
    """Saved, loaded and continued: the second log takes up where the state stands."""
    model = net()
    base = copy.deepcopy(model)
    first = run(model, tmp_path / "one", steps=2)
    second = MeZO(model, lr=1e-2, eps=1e-2, seed=0, log=None)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step(closure_of(model))
    whole = copy.deepcopy(base)
    run(whole, tmp_path / "whole", steps=4)
    assert same(whole, state(model))


def test_what_a_log_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Another decay, and the state of another step: a replay would not give the run's weights."""
    model = net()
    optimizer = run(model, tmp_path / "one", steps=2, weight_decay=0.1)
    saved, before = copy.deepcopy(optimizer.state_dict()), state(model)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match=r"^weight_decay: expected \[0.1\] of the groups, .* got \[0.5\]"):
        optimizer.step(closure_of(model))
    assert same(model, before)
    other = MeZO(model, log=tmp_path / "two", seed=4)
    with pytest.raises(ValueError, match="^log: expected none, or one at the state's step 2 .* got one at step 0"):
        other.load_state_dict(saved)
    assert other.steps == 0
    optimizer.load_state_dict(saved)
    optimizer.step(closure_of(model))


def micro(model: Net, part: slice):  # type: ignore[no-untyped-def]
    return lambda: nn.functional.cross_entropy(model(TOKENS[part]).float(), LABELS[part])


def worker(rank: int, folder: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = net(dtype)
    # Seeds differ: the first worker's holds for both.
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, seed=3 if rank == 0 else 99, directions=2, process_group=True)
    parts = [slice(4 * rank, 4 * rank + 2), slice(4 * rank + 2, 4 * rank + 4)]
    for _ in range(3):
        optimizer.step([micro(model, part) for part in parts])
    torch.save([p.detach() for p in model.parameters()], f"{folder}/weights{rank}")
    try:
        MeZO(nn.Linear(2, 2 + rank), process_group=True)
    except ValueError as error:
        assert "do not train the same parameters" in str(error)
    else:
        raise AssertionError("workers with other parameters were not told apart")
    model = net(dtype)
    with torch.no_grad():
        model.second.weight.add_(rank)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MeZO(model, process_group=True)
    for _ in range(2):
        try:
            optimizer.step([micro(model, parts[0])])
        except ValueError as error:
            assert str(error).startswith(
                "params: expected the same weights on all workers, got others in second.weight;"
            )
        else:
            raise AssertionError("workers with other weights were not told apart")
    assert same(model, before)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo processes on the CPU")
def test_two_workers_are_one_that_accumulates(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, str(tmp_path), BF16)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    model = net(BF16)
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, seed=3, directions=2)
    for _ in range(3):
        optimizer.step([micro(model, slice(k, k + 2)) for k in (0, 2, 4, 6)])
    for rank in range(2):
        weights: list[Tensor] = torch.load(tmp_path / f"weights{rank}")
        assert same(model, weights)
