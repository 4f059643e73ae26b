"""Planted faults in the quantised and sparse methods, the operations on deltas and the optimisers: the real tests must notice each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftfast.methods import (
    bi_lora,
    chosen,
    deltas,
    frozen,
    galore,
    id3,
    l4q,
    layer_sampling,
    mask_tuning,
    qst,
    sara,
    sketchtune,
    sparse_low_rank,
    wta_crs,
)
from tests import test_methods_optimisers as optimisers
from tests import test_methods_quantised as quantised
from tests import test_methods_supports as supports


def _around(owner: Any, name: str, fault: Callable[..., Any]) -> tuple[Any, str, Any]:
    """``fault`` gets the true function before its arguments."""
    true = getattr(owner, name)
    return owner, name, lambda *given, **named: fault(true, *given, **named)


MUTANTS: dict[str, tuple[tuple[Any, str, Any], Callable[..., None]]] = {
    "l4q: no gradient through the rounding": (
        _around(l4q.L4QLinear, "codes", lambda true, self: true(self).detach()),
        quantised.test_l4q,
    ),
    "l4q: offset left out": (
        (l4q.L4QLinear, "composed", lambda self: (self.codes() * self.step).reshape(self.out_features, -1)),
        quantised.test_l4q,
    ),
    "sketchtune: mean for sum": (
        (sketchtune._Lookup, "backward", staticmethod(lambda ctx, g: (g[:, :1].expand(-1, ctx.values), None))),
        quantised.test_sketchtune,
    ),
    "bi-lora: level": ((bi_lora, "LEVEL", 1.0), quantised.test_bi_lora),
    "bi-lora: gradient not straight": (
        (bi_lora._Straight, "backward", staticmethod(lambda ctx, g: g / 2)),
        quantised.test_bi_lora,
    ),
    "qst: gate the wrong way round": (
        _around(qst.torch, "sigmoid", lambda true, x: 1 - true(x)),
        lambda path: quantised.test_qst("llama", path),
    ),
    "compeft: scale": (
        _around(deltas, "compeft", lambda true, d, **n: {k: v * 2 for k, v in true(d, **n).items()}),
        quantised.test_compeft,
    ),
    "breadcrumbs: outliers stay": (
        _around(deltas, "breadcrumbs", lambda true, tasks, **n: true(tasks, **{**n, "gamma": 1.0})),
        quantised.test_breadcrumbs,
    ),
    "composition: the last one's value": (
        _around(deltas, "compose", lambda true, given: {**true(given), **(given[-1] if given else {})}),
        quantised.test_sparse_deltas_of_two_trainings_compose,
    ),
    "skill: fewer steps": (
        _around(deltas, "skill_localisation", lambda true, *a, **n: true(*a, **{**n, "steps": 1})),
        quantised.test_skill_localisation,
    ),
    "sara: another norm": ((sara, "nuclear_norm", lambda matrix: matrix.norm()), supports.test_sara),
    "sara: nothing frozen": ((sara.SaRARuntime, "freeze", lambda self, name, mask: None), supports.test_sara),
    "lt-sft: what moved least": (
        _around(chosen, "top_of_all", lambda true, s, density: true({k: -v for k, v in s.items()}, density)),
        supports.test_lt_sft,
    ),
    "id3: closed weights move": ((frozen.FreezingRuntime, "restore", lambda self: None), supports.test_id3),
    "id3: ages of others": ((id3, "_reset", lambda *given: None), supports.test_id3),
    "spt: another sensitivity": (
        _around(chosen, "fisher", lambda true, *a: {k: v.flip(1) for k, v in true(*a).items()}),
        supports.test_spt,
    ),
    "hft: all of it": ((chosen, "halves", lambda names, generator: names), supports.test_hft),
    "dsee: remainder of another rank": (
        _around(sparse_low_rank, "residual_support", lambda true, w, r, active: true(w, 1, active)),
        supports.test_dsee,
    ),
    "sltrain: merged without its sparse part": (
        (
            sparse_low_rank.SLTrainLinear,
            "merged_weight",
            lambda self: self.scaling * (self.lora_B @ self.lora_A).detach(),
        ),
        supports.test_sltrain,
    ),
    "mask: threshold": (
        (mask_tuning.MaskedLinear, "mask", lambda self: self.scores.detach() > 2 * self.threshold),
        supports.test_mask_tuning,
    ),
    "galore: states begin anew": (
        (galore.GaLore, "_new_basis", lambda self, state: state["exp_avg"].zero_() if "exp_avg" in state else None),
        lambda path: optimisers.test_galore("galore", path),
    ),
    "natural galore: no Fisher matrix": (
        (galore.NaturalGaLore, "_conditioned", lambda self, small, group, state: small),
        lambda path: optimisers.test_galore("natural-galore", path),
    ),
    "gradnormlorp: not projected": (
        (galore.ProjectedRuntime, "optimizer", lambda self, groups: torch.optim.AdamW(groups)),
        optimisers.test_gradnormlorp,
    ),
    "lisa: states stay": (
        _around(layer_sampling.LayerSampler, "_activate", lambda true, self, names, by: true(self, names, None)),
        optimisers.test_lisa,
    ),
    "owlore: blocks all alike": (
        _around(layer_sampling, "outlier_ratios", lambda true, *a: dict.fromkeys(true(*a), 0.1)),
        optimisers.test_owlore,
    ),
    "wta-crs: rows not weighted": (
        _around(wta_crs, "choose_rows", lambda true, *a: (true(*a)[0], torch.ones_like(true(*a)[1]))),
        optimisers.test_sampled_gradient_has_the_exact_mean,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_noticed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (owner, attribute, fault), check = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(AssertionError):
        check(*(tmp_path,) if inspect.signature(check).parameters else ())
