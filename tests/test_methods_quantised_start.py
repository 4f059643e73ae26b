"""LoftQ, EoRA and LQ-LoRA: a 4-bit weight and what makes up for it, against the papers' formulas in plain torch."""

import copy
import itertools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

import peftfast
import peftfast.functional as F
from peftfast.integrations.adapter_files import WEIGHTS
from peftfast.integrations.adapter_start import started_from
from peftfast.methods import lq_lora
from peftfast.nn import LoRALinear, LoRANF4Linear, NF4Linear
from tests.support.method_checks import Mlp, adapted, batches, check_files, check_steps, plain_model, stir
from tests.test_methods_initialised import COUNT, TARGETS, principal


def quantised(weight: Tensor) -> Tensor:
    """NF4 by bitsandbytes, decoded; as rows of 64, since its decoder for CPUs is wrong where K is no multiple of 64."""
    packed, state = bnb.functional.quantize_4bit(
        weight.float().reshape(-1, 64), blocksize=64, quant_type="nf4", compress_statistics=False
    )
    return bnb.functional.dequantize_4bit(packed, state).reshape(weight.shape)


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq(iterations: int, tmp_path: Path) -> None:
    """The algorithm with bitsandbytes' quantiser in plain torch; ``up`` is [64, 48], ``down`` [40, 64], whole blocks of 64."""
    handle = adapted("loftq", dtype=torch.float32, r=4, lora_alpha=8.0, loftq_iter=iterations)
    for name in TARGETS:
        weight = Mlp(torch.float32).get_submodule(name).weight.detach()
        low = torch.zeros_like(weight)
        for _ in range(iterations):
            q = quantised(weight - low)
            low = principal(weight - q)
        layer = handle.layers[name]
        assert isinstance(layer, LoRANF4Linear) and layer.lora_A.shape[0] == 4
        torch.testing.assert_close(F.nf4_dequantize(layer.nf4), q, rtol=0, atol=1e-6)
        torch.testing.assert_close(2.0 * layer.lora_B @ layer.lora_A, low, rtol=0, atol=1e-5)
        assert (weight - q - low).norm() < (weight - quantised(weight)).norm()
    stir(handle)
    plain = plain_model(
        handle,
        lambda layer, base, p: base + 2.0 * p["lora_B"] @ p["lora_A"],
        {n: F.nf4_dequantize(h.nf4) for n, h in handle.layers.items()},
    )
    check_steps(handle, plain, None, 2e-5, steps=2)
    assert handle.trainable == COUNT
    if iterations > 1:  # the files hold Q, for a dense base and for a quantised one
        check_files(handle, tmp_path, tolerance=1e-5)
        check_files(handle, tmp_path, four_bit=True, tolerance=1e-5)
        return
    peftfast.save_adapter(handle.model, tmp_path)  # PEFT's LoRA, for the base in NF4
    base = Mlp(torch.float32)
    for name in TARGETS:
        setattr(base, name, NF4Linear.from_linear(base.get_submodule(name), double_quant=False))
    batch = batches(1, torch.float32)[0]
    loaded = peftfast.load_adapter(base, tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, handle.model(**batch).logits, rtol=1e-5, atol=1e-5)
    check_started_from(handle, tmp_path)
    four = adapted("lora", dtype=torch.float32, four_bit=True)
    assert four.layers
    with pytest.raises(ValueError, match="starts from the weight before it is quantised"):
        adapted("loftq", dtype=torch.float32, four_bit=True, r=4)


def check_started_from(handle: Any, folder: Path) -> None:
    """The file says in which 4 bits the adapter began: a dense base is brought into them, another's difference is named."""
    expected = {"quant_type": "nf4", "block_size": 64, "double_quant": handle.options.double_quant}
    batch = batches(1, torch.float32)[0]
    wanted = handle.model(**batch).logits
    for directory in (folder, folder / "again"):
        assert started_from(directory / WEIGHTS) == expected
        loaded = peftfast.load_adapter(Mlp(torch.float32), folder)
        torch.testing.assert_close(loaded(**batch).logits, wanted, rtol=1e-5, atol=1e-5)
        peftfast.save_adapter(loaded, folder / "again")
    half = peftfast.load_adapter(Mlp(torch.bfloat16), folder)
    assert {half.get_submodule(name).nf4.dtype for name in TARGETS} == {torch.bfloat16}
    other = Mlp(torch.float32)
    for name in TARGETS:
        linear = NF4Linear.from_linear(other.get_submodule(name), double_quant=not handle.options.double_quant)
        setattr(other, name, linear)
    with pytest.warns(UserWarning, match="began on a base in 4 bits.*not quite the one that was trained"):
        peftfast.load_adapter(other, folder)
    dense = Mlp(torch.float32)
    dense.up = LoRALinear.from_linear(dense.up, r=4, lora_alpha=8)
    with pytest.raises(ValueError, match="expected a base in 4 bits"):
        peftfast.load_adapter(dense, folder)
    assert type(dense.down) is nn.Linear


def test_eora(tmp_path: Path) -> None:
    """Eckart and Young in the inputs' metric: no other rank-4 matrix leaves less of ‖(W - Q - L) X‖; and the formula itself."""
    data = batches(5, torch.float32)
    handle = peftfast.adapt(Mlp(torch.float32), "eora", target_modules=TARGETS, batches=data, r=4, lora_alpha=8.0)
    base = Mlp(torch.float32)
    for name in TARGETS:
        weight = base.get_submodule(name).weight.detach().double()
        x = torch.cat([one["x"] for one in data])
        x = (x if name == "up" else torch.tanh(base.up(x))).detach().double()
        layer = handle.layers[name]
        error = weight - F.nf4_dequantize(layer.nf4).double()
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        root = values.clamp(min=float(values[-1]) * 1e-6).sqrt()
        projected = principal(error @ vectors @ torch.diag(root)) @ torch.diag(1 / root) @ vectors.T
        low = 2.0 * (layer.lora_B @ layer.lora_A).detach().double()
        torch.testing.assert_close(low, projected, rtol=0, atol=1e-5)
        left = ((error - low) @ x.T).norm()
        assert left < 0.95 * (error @ x.T).norm() and left < ((error - principal(error)) @ x.T).norm()
    assert handle.trainable == COUNT
    stir(handle)
    bases = {n: F.nf4_dequantize(layer.nf4) for n, layer in handle.layers.items()}
    plain = plain_model(handle, lambda layer, base, p: base + 2.0 * p["lora_B"] @ p["lora_A"], bases)
    check_steps(handle, plain, None, 2e-5, steps=2)
    check_files(handle, tmp_path, four_bit=True, tolerance=1e-5)
    check_started_from(handle, tmp_path)


def test_lq_lora(tmp_path: Path) -> None:
    """The weighted SVD is the best one for a weight that is an outer product; the error falls; the budget is kept."""
    torch.manual_seed(0)
    matrix, rows, columns = torch.randn(30, 20), torch.rand(30, 1) + 0.1, torch.rand(1, 20) + 0.1
    left, right = lq_lora.weighted_svd(matrix, (rows * columns) ** 2, 4)
    # Row and column means of an outer product are it, up to one factor, which the SVD does not see.
    by_hand = principal(rows * matrix * columns) / rows / columns
    exact_rows = (rows**2).sqrt()
    torch.testing.assert_close(
        left @ right, principal(exact_rows * matrix * columns) / exact_rows / columns, rtol=0, atol=1e-4
    )
    torch.testing.assert_close(left @ right, by_hand, rtol=0, atol=1e-4)
    weights = torch.rand(64, 48)
    weight = Mlp(torch.float32).up.weight.detach()
    once = lq_lora.decompose(weight, weights, 4, 64, True, 1)
    often = lq_lora.decompose(weight, weights, 4, 64, True, 6)
    assert often[3] <= once[3]
    rest = weight - often[0] @ often[1]
    wrong = weights * (rest - F.nf4_dequantize(F.nf4_quantize(rest))) ** 2
    assert float(wrong.sum()) == pytest.approx(often[3], rel=1e-5)

    data = batches(3, torch.float32)
    handle = peftfast.adapt(
        Mlp(torch.float32), "lq-lora", target_modules=TARGETS, batches=data, r=4, lora_alpha=8.0, budget=4.3
    )
    used = sum(
        lq_lora.bits(layer.block_size, layer.nf4.nested) * layer.in_features * layer.out_features
        for layer in handle.layers.values()
    )
    assert used <= 4.3 * (64 * 48 + 40 * 64) and handle.trainable == COUNT
    wide = peftfast.adapt(
        Mlp(torch.float32), "lq-lora", target_modules=TARGETS, batches=data, r=4, lora_alpha=8.0, budget=5.0
    )
    assert {layer.block_size for layer in wide.layers.values()} == {32}
    with pytest.raises(ValueError, match="budget: .* bits are fewer than any choice takes"):
        peftfast.adapt(Mlp(torch.float32), "lq-lora", target_modules=TARGETS, use_fisher=False, r=4, budget=4.0)
    assert peftfast.adapt(Mlp(torch.float32), "lq-lora", target_modules=TARGETS, use_fisher=False, r=4).layers
    stir(handle)
    bases = {n: F.nf4_dequantize(layer.nf4) for n, layer in handle.layers.items()}
    plain = plain_model(handle, lambda layer, base, p: base + 2.0 * p["lora_B"] @ p["lora_A"], bases)
    check_steps(handle, plain, None, 2e-5, steps=2)
    check_files(handle, tmp_path, tolerance=1e-5)


def test_bit_budget_is_the_best_choice() -> None:
    """Against every choice tried in turn."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        costs, storage = torch.rand(4, 3, generator=generator), torch.randint(1, 9, (4, 3), generator=generator)
        budget = int(storage.amin(1).sum()) + 3
        chosen = lq_lora.assign(costs.tolist(), storage.tolist(), budget)
        pick = lambda which, table: sum(float(table[i, k]) for i, k in enumerate(which))  # noqa: E731
        fitting = [c for c in itertools.product(range(3), repeat=4) if pick(c, storage) <= budget]
        assert pick(chosen, costs) == pytest.approx(min(pick(c, costs) for c in fitting))
        assert pick(chosen, storage) <= budget


def test_fisher_information() -> None:
    """Sum over examples of the squared gradient, for rows and for sequences."""
    from peftfast.methods.adapting import Targets
    from peftfast.methods.passes import fisher
    from peftfast.methods.registry import get

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"loss": torch.tanh(self.inner(x)).square().sum()})

    for shape in ((5, 3), (5, 4, 3)):
        model, x = Sums().double().requires_grad_(False), torch.randn(shape, dtype=torch.float64)
        found = fisher(Targets(model, get("lq-lora"), ["inner"], [{"x": x[:2]}, {"x": x[2:]}], False), "test")["inner"]
        expected = torch.zeros(2, 3, dtype=torch.float64)
        twin = copy.deepcopy(model).requires_grad_(True)
        for one in x:
            twin.zero_grad()
            twin(one[None]).loss.backward()
            expected += twin.inner.weight.grad**2
        torch.testing.assert_close(found, expected)
