"""Planted faults in the methods beside a frozen model and in those that compress it: the real tests must notice each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftfast.methods import finequant, lst, pela, pst, sherl, sidenet, sketchtune, transformed_lora, unipt, wta_crs
from peftfast.reference import nf4
from tests import test_methods_compressed as compressed
from tests import test_methods_side_networks as beside


def _around(owner: Any, name: str, fault: Callable[..., Any]) -> tuple[Any, str, Any]:
    """``fault`` gets the true function before its arguments."""
    true = getattr(owner, name)
    return owner, name, lambda *given, **named: fault(true, *given, **named)


def _code(quant_type: str, device: torch.device) -> torch.Tensor:
    return (torch.arange(16, dtype=torch.float32) - 8) / 8


MUTANTS: dict[str, tuple[tuple[Any, str, Any], Callable[..., None]]] = {
    "lst: gate the wrong way round": (
        _around(lst.torch, "sigmoid", lambda true, x: 1 - true(x)),
        lambda path: beside.test_lst("llama", path),
    ),
    "lst: the least channels": (
        _around(lst, "_largest", lambda true, scores, count: true(-scores, count)),
        lambda: beside.test_lst_begins_at_the_models_own_weights("llama"),
    ),
    "lst: heads apart from their groups": (
        _around(lst.Pruning, "_of_block", lambda true, self, w: {**true(self, w), "heads": torch.arange(0, 64, 2)}),
        beside.test_lst_keeps_whole_groups_of_heads,
    ),
    "side network: a cache of its own kind": (
        (sidenet, "_make_room", lambda cache, side, tokens: False),
        lambda: beside.test_generation_with_a_cache("lst", "llama"),
    ),
    "unipt: sums of squares": (
        (unipt, "l1_normalised", lambda x, dim: x / x.square().sum(dim, keepdim=True).clamp(min=1e-6)),
        beside.test_unipt,
    ),
    "unipt: padding is read": ((unipt, "tokens_of", lambda mask: None), beside.test_unipt),
    "sherl: redundancy left out": (
        (sherl.functional, "normalize", lambda x, **named: torch.ones_like(x)),
        lambda path: beside.test_sherl("bert", path),
    ),
    "sherl: gate": (_around(sherl.torch, "tanh", lambda true, x: true(2 * x)), lambda path: beside.test_sherl("llama", path)),
    "pst: no scores of rows and columns": (
        (pst.PSTLinear, "scores", lambda self, v: v.abs() + self.options.mask_alpha1 * (self.mask_A @ self.mask_B)),
        compressed.test_pst,
    ),
    "pst: no gradient of the scores": (
        (pst._Keep, "backward", staticmethod(lambda ctx, gradient: (None, None))),
        compressed.test_pst,
    ),
    "pst: linear in time": (
        (pst.Options, "sparsity_at", lambda self, step: self.sparsity * min(1.0, step / self.total_steps)),
        compressed.test_pst,
    ),
    "transformed lora: sides in another order": (
        _around(transformed_lora, "chain", lambda true, cores: true(cores[::-1])),
        compressed.test_rings_entry_by_entry,
    ),
    "transformed lora: the ring is not closed": (
        _around(transformed_lora.TransformedLoRALinear, "halves", lambda true, self: (true(self)[0], true(self)[1].mT)),
        compressed.test_transformed_lora,
    ),
    "transformed lora: penalty of one core": (
        _around(
            transformed_lora.TransformedLoRALinear,
            "distance",
            lambda true, self: (self.transform[0] - 1 / self.transform[0].shape[2]).norm(),
        ),
        compressed.test_transformed_lora,
    ),
    "pela: halves unbalanced": (
        _around(pela, "truncated_svd", lambda true, w, rank: (true(w, rank)[0], true(w, rank)[1] ** 2, true(w, rank)[2])),
        compressed.test_pela,
    ),
    "pela: taught by itself": (
        (pela.PELARuntime, "_taught", lambda self: [one.detach() for one in self.features]),
        compressed.test_pela_learns_the_whole_models_features,
    ),
    "pela: mean change": (
        (pela.PELALinear, "change", lambda self: (self.left @ self.right - self.dense_weight()).abs().mean()),
        compressed.test_pela_learns_the_whole_models_features,
    ),
    "int4: eighths": ((nf4, "code_table", _code), compressed.test_int4_is_rounding_to_sevenths),
    "finequant: always the finest": (
        (finequant, "granularity", lambda weight, alpha, smallest: smallest),
        lambda: _patched(compressed, "granularity", finequant.granularity, compressed.test_granularity),
    ),
    "sketchtune: errors alike": (
        _around(sketchtune, "cluster", lambda true, rows, values, n, weights=None: true(rows, values, n)),
        lambda: _patched(compressed, "cluster", sketchtune.cluster, compressed.test_sketchtune_weighs_errors),
    ),
    "sketchtune: later inputs make up for nothing": (
        (sketchtune, "assign", lambda w, table, order, root, block=128: _nearest(w, table)),
        lambda: _patched(compressed, "assign", sketchtune.assign, compressed.test_sketchtune_weighs_errors),
    ),
    "wta-crs: norms of other examples": (
        _around(wta_crs.GradientNorms, "keep", lambda true, self, layer, at, norms: true(self, layer, at.flip(0), norms)),
        lambda: _with_patches(compressed.test_wta_crs_remembers_gradient_norms),
    ),
}  # fmt: skip


def _nearest(weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    n, groups = table.shape[:2]
    middles = ((table[..., 1:] + table[..., :-1]) / 2).reshape(n * groups, -1).contiguous()
    return torch.searchsorted(middles, weight.reshape(n * groups, -1).contiguous()).reshape(weight.shape)


def _patched(module: Any, name: str, fault: Any, check: Callable[[], None]) -> None:
    """The test's own name for the function shows the fault too."""
    true = getattr(module, name)
    setattr(module, name, fault)
    try:
        check()
    finally:
        setattr(module, name, true)


def _with_patches(check: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patches:
        check(patches)


@pytest.mark.parametrize("name", MUTANTS)
def test_noticed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (owner, attribute, fault), check = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(AssertionError):
        check(*(tmp_path,) if inspect.signature(check).parameters else ())
