"""Planted faults in the methods: for each formula one way to get it wrong, which the checks of the real tests must notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftfast.methods import (
    corda,
    diagonal,
    eva,
    initialised,
    loftq,
    lora_ga,
    lora_sb,
    lora_xs,
    lq_lora,
    nystrom,
    passes,
    pissa,
    vera,
)
from peftfast.methods.factored import FactoredLinear, Factors
from peftfast.nn import LoRALinear
from tests import test_methods, test_methods_core, test_methods_initialised, test_methods_quantised_start
from tests.support import method_checks


def _factors(cls: type, change: Callable[[Any, Factors], Factors]) -> tuple[Any, str, Any]:
    true = cls.factors
    return cls, "factors", lambda self: change(self, true(self))


def _result(module: Any, name: str, change: Callable[[Any], Any]) -> tuple[Any, str, Any]:
    true = getattr(module, name)
    return module, name, lambda *given, **named: change(true(*given, **named))


def _seeing(module: Any, name: str, change: Callable[..., tuple[Any, ...]]) -> tuple[Any, str, Any]:
    true = getattr(module, name)
    return module, name, lambda *given: true(*change(*given))


def _half(found: Factors) -> Factors:
    return found._replace(scaling=found.scaling / 2)


core, first, quantised = test_methods_core, test_methods_initialised, test_methods_quantised_start
MUTANTS: dict[str, tuple[tuple[Any, str, Any], Callable[[Path], None]]] = {
    "lora-xs: scaling": (_factors(lora_xs.LoRAXSLinear, lambda layer, f: _half(f)), test_methods.test_lora_xs),
    "lora-xs: core transposed": (
        _factors(lora_xs.LoRAXSLinear, lambda layer, f: f._replace(b=layer.frozen_B @ layer.latent.T)),
        test_methods.test_lora_xs,
    ),
    "lora-xs: singular values on neither": (
        _result(lora_xs, "truncated_svd", lambda found: (found[0], torch.ones_like(found[1]), found[2])),
        test_methods.test_lora_xs,
    ),
    "lora-xs: core without gradient": (
        _factors(lora_xs.LoRAXSLinear, lambda layer, f: f._replace(b=f.b.detach() + 0 * layer.latent.sum())),
        test_methods.test_lora_xs,
    ),
    "slora: no N": (
        _factors(nystrom.SLoRALinear, lambda layer, f: f._replace(b=layer.lora_B + 0 * f.b)),
        core.test_slora,
    ),
    "nlora: rows for columns": (
        _result(nystrom, "nystrom", lambda found: (found[0], found[1].T, found[2])),
        lambda path: core.test_nlora_and_inttune(False, path),
    ),
    "inttune: start not taken out": (
        _factors(nystrom.IntTuneLinear, lambda layer, f: f._replace(b=layer.frozen_B @ layer.lora_N)),
        lambda path: core.test_nlora_and_inttune(False, path),
    ),
    "lora-sb: gradient for its sign": (
        _seeing(lora_sb, "truncated_svd", lambda m, r: (m * m.abs().add(0.1), r)),
        lambda path: core.test_lora_sb(False, path),
    ),
    "lora-sb: uphill": (
        _seeing(lora_sb, "truncated_svd", lambda m, r: (-m, r)),
        lambda path: core.test_lora_sb(False, path),
    ),
    "svfit: values squared": (
        _factors(
            diagonal.SVFitLinear, lambda layer, f: f._replace(b=layer.frozen_B * (layer.values**2 - layer.initial**2))
        ),
        core.test_svfit,
    ),
    "loldu: sigma left out": (
        _factors(
            diagonal.LoLDULinear, lambda layer, f: f._replace(b=layer.frozen_B * (0.5 * layer.diagonal - layer.initial))
        ),
        core.test_loldu,
    ),
    "vera: d on the wrong side": (
        _factors(vera.VeRALinear, lambda layer, f: f._replace(b=f.b / layer.vera_lambda_d)),
        core.test_vera,
    ),
    "vera: other draws": (
        _seeing(vera, "Projections", lambda r, columns, rows, seed: (r, columns, rows, seed + 1)),
        core.test_vera,
    ),
    "residual: weight as it was": (
        (initialised.ResidualLoRALinear, "_take_out", lambda self: None),
        lambda path: first.test_principal_part("pissa", path),
    ),
    "residual: scaling": (
        _seeing(pissa, "scaling_of", lambda options: (type(options)(r=options.r, lora_alpha=2 * options.lora_alpha),)),
        lambda path: first.test_principal_part("pissa", path),
    ),
    "files: the start not subtracted": (
        (LoRALinear, "initial_A", None),
        lambda path: first.test_principal_part("pissa", path),
    ),
    "eva: inputs not centred": (
        (eva._Moments, "add", lambda self, x: _uncentred(self, x)),
        first.test_eva,
    ),
    "eva: smallest directions": (
        (eva, "ranks_by_variance", lambda ratios, budget: dict.fromkeys(ratios, budget // len(ratios))),
        first.test_eva,
    ),
    "corda: not damped": (
        (corda, "damped_inverse", lambda c: (c, torch.linalg.pinv(c))),
        lambda path: first.test_corda("kpm", path),
    ),
    "corda: the other mode": (
        (corda.Options, "corda_method", property(lambda self: "kpm", lambda self, value: None)),
        lambda path: first.test_corda("ipm", path),
    ),
    "lora-ga: another gradient": (
        _result(lora_ga, "weight_gradients", lambda found: {name: g + 0.1 * g.abs() for name, g in found.items()}),
        first.test_lora_ga,
    ),
    "lora-ga: size": (_result(lora_ga, "factors", lambda found: (found[0], 2 * found[1])), first.test_lora_ga),
    "loftq: never quantised again": (
        _seeing(loftq, "decoded", lambda w, block, nested: (w * 1.01, block, nested)),
        lambda path: quantised.test_loftq(3, path),
    ),
    "eora: not projected": (
        _seeing(loftq, "eigenspace_factors", lambda e, m, r: (e, torch.eye(len(m)), r)),
        quantised.test_eora,
    ),
    "lq-lora: not weighted": (_seeing(lq_lora, "weighted_svd", lambda m, w, r: (m, None, r)), quantised.test_lq_lora),
    "lq-lora: budget of half the bits": (
        _seeing(lq_lora, "assign", lambda costs, storage, budget: (costs, storage, 2 * budget)),
        quantised.test_lq_lora,
    ),
    "Fisher: squared sum": (
        _result(passes, "fisher", lambda found: {name: f.sqrt() for name, f in found.items()}),
        lambda path: quantised.test_fisher_information(),
    ),
    "merge: scaling left out": (
        (FactoredLinear, "merged_weight", lambda self: self.dense_weight() + self.factors().b @ self.factors().a),
        test_methods.test_lora_xs,
    ),
    "parameters: one too many": (
        (
            method_checks.AdapterHandle,
            "trainable",
            property(lambda self: 1 + sum(p.numel() for p in self.adapter_parameters())),
        ),
        test_methods.test_lora,
    ),
}


def _uncentred(moments: eva._Moments, x: torch.Tensor) -> None:
    moments.rows += x.shape[0]
    moments.products += x.double().T @ x.double()


@pytest.mark.parametrize("name", MUTANTS)
def test_noticed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (owner, attribute, fault), check = MUTANTS[name]
    if name.startswith("files"):
        from peftfast.methods import saved

        monkeypatch.setattr(saved, "_replaced", lambda layer: False)
    else:
        monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(AssertionError):
        check(tmp_path)
