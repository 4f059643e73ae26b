"""Groups of projections and batches of several adapters, forward and every gradient, against float64 autograd of their definitions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import peftfast.functional as F
from peftfast.reference import lora as definition
from tests.support.layer_checks import dense_weight
from tests.support.lora_checks import BF16, DEVICE, F32, F64, Results, check_results, matrix


@dataclass(frozen=True)
class Part:
    """One projection, or one adapter of a batch (which has neither N, weight, bias nor magnitude of its own)."""

    N: int = 45
    R: int = 5
    p: float = 0.1
    scaling: float = 1.5
    weight: str = "dense"
    bias: bool = False
    lora_bias: bool = False
    magnitude: bool = False
    frozen: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroupCase:
    """``parts`` are projections of one x, or with ``batch`` the adapters of one weight, that of the first part: in the rows that name
    them (``named``: "leading", "rows"), or on all ("all")."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...] = (3, 11, 67)
    x: torch.dtype = F32
    adapter: torch.dtype = F32
    compute: torch.dtype | None = None
    batch: bool = False
    named: str = "all"
    needs_x: bool = True
    layout: str = "plain"
    data: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.compute or self.x

    @property
    def rows(self) -> Tensor | None:
        if self.named == "all":
            return None
        shape = self.shape[:1] if self.named == "leading" else self.shape[:-1]
        generator = torch.Generator().manual_seed(self.data)
        return torch.randint(-1, len(self.parts), shape, generator=generator).to(DEVICE)

    def seed(self, index: int) -> Tensor:
        return torch.tensor([(0x5EED << 40) + 100 * self.data + index], device=DEVICE)


Tensors = dict[str, Any]
_LEAVES = ("lora_a", "lora_b", "lora_bias", "bias", "magnitude")


def tensors_of(case: GroupCase) -> Tensors:
    """Named x, weight0, lora_a0, ...; adapters' terms are as large as the base's."""
    generator = torch.Generator().manual_seed(4000 + case.data)
    K, narrow, compute = case.shape[-1], case.adapter, case.compute_dtype
    tensors: Tensors = {"x": matrix(torch.Size(case.shape[:-1]).numel(), K, case.x, case.layout, generator)}
    tensors["x"] = tensors["x"].reshape(case.shape)
    if case.needs_x:
        tensors["x"].requires_grad_()
    for i, part in enumerate(case.parts):
        own = part if not case.batch else case.parts[0]
        N, R = own.N, part.R
        if i == 0 or not case.batch:
            dense = (matrix(N, K, F32, "plain", generator) / K**0.5).to(compute)
            nested = part.weight == "nested"
            tensors[f"weight{i}"] = dense if part.weight == "dense" else F.nf4_quantize(dense, double_quant=nested)
            tensors[f"bias{i}"] = matrix(1, N, compute, "plain", generator)[0] if part.bias else None
            tensors[f"magnitude{i}"] = torch.rand(N, generator=generator).to(DEVICE) + 0.5 if part.magnitude else None
        tensors[f"lora_a{i}"] = matrix(R, K, narrow, case.layout, generator) / max(K, 1) ** 0.5
        tensors[f"lora_b{i}"] = matrix(N, R, narrow, case.layout, generator) / (max(R, 1) ** 0.5 * part.scaling)
        tensors[f"lora_bias{i}"] = matrix(1, N, narrow, "plain", generator)[0] if part.lora_bias else None
        for name in _LEAVES:
            tensor = tensors.get(f"{name}{i}")
            if tensor is not None and name not in part.frozen:
                tensors[f"{name}{i}"] = tensor.detach().requires_grad_()
    return tensors


def run(case: GroupCase, tensors: Tensors, **options: Any) -> list[Tensor]:
    """What is tested."""
    options.setdefault("compute_dtype", case.compute)
    seeded = options.pop("seeded", True)
    adapters: list[Any] = []
    for i, part in enumerate(case.parts):
        common = (tensors[f"lora_a{i}"], tensors[f"lora_b{i}"], part.scaling)
        rest: dict[str, Any] = {"lora_bias": tensors[f"lora_bias{i}"], "dropout_p": part.p}
        rest["seed"] = case.seed(i) if seeded else None
        if case.batch:
            adapters.append(F.Adapter(*common, **rest))
        else:
            base = {"bias": tensors[f"bias{i}"], "magnitude": tensors[f"magnitude{i}"]}
            adapters.append(F.Projection(tensors[f"weight{i}"], *common, **base, **rest))
    if not case.batch:
        return list(F.lora_linears(tensors["x"], adapters, **options))
    rows = case.rows
    return [F.multi_lora_linear(tensors["x"], tensors["weight0"], adapters, rows, bias=tensors["bias0"], **options)]


def define(case: GroupCase, tensors: Tensors, dtype: torch.dtype, out_dtype: torch.dtype) -> list[Tensor]:
    """The definition, every tensor cast to ``dtype``."""
    cast = {
        name: None if t is None else dense_weight(t, dtype) if name.startswith("weight") else t.to(dtype)
        for name, t in tensors.items()
    }
    if case.batch:
        adapters = [
            {
                "lora_a": cast[f"lora_a{i}"],
                "lora_b": cast[f"lora_b{i}"],
                "lora_bias": cast[f"lora_bias{i}"],
                "scaling": part.scaling,
                "dropout_p": part.p,
                "seed": case.seed(i),
            }
            for i, part in enumerate(case.parts)
        ]
        rows = None if case.rows is None else case.rows.reshape(-1)
        y = definition.multi_lora_linear(cast["x"], cast["weight0"], adapters, rows, bias=cast["bias0"])
        return [y.to(out_dtype)]
    return [
        definition.lora_linear(
            cast["x"],
            *(cast[f"{name}{i}"] for name in ("weight", "lora_a", "lora_b")),
            scaling=part.scaling,
            bias=cast[f"bias{i}"],
            lora_bias=cast[f"lora_bias{i}"],
            magnitude=cast[f"magnitude{i}"],
            dropout_p=part.p,
            seed=case.seed(i),
        ).to(out_dtype)
        for i, part in enumerate(case.parts)
    ]


def gradients(ys: list[Tensor], tensors: Tensors, dys: list[Tensor]) -> dict[str, Tensor]:
    leaves = {name: t for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad}
    if not leaves:
        return {}
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in pairs], list(leaves.values()), [dy for _, dy in pairs], allow_unused=True
    )
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found, strict=True)}


def upstream(case: GroupCase, ys: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5000 + case.data)
    return [torch.randn(y.shape, generator=generator).to(DEVICE, y.dtype) for y in ys]


def _named(ys: list[Tensor]) -> dict[str, Tensor]:
    return {f"y{i}": y.detach() for i, y in enumerate(ys)}


def results(case: GroupCase) -> Results:
    tensors = tensors_of(case)
    ys = run(case, tensors)
    dys = upstream(case, ys)
    actual = {**_named(ys), **gradients(ys, tensors, dys)}
    for name, value in actual.items():
        expected = (case.x if case.compute else case.compute_dtype) if name[0] == "y" else tensors[name].dtype
        assert value.dtype == expected, f"{name}: {value.dtype}, expected {expected}; {case}"
    composed_ys = define(case, tensors, case.compute_dtype, ys[0].dtype)
    composed = {**_named(composed_ys), **gradients(composed_ys, tensors, dys)}
    wide = {
        name: t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in tensors.items()
    }
    exact_ys = define(case, wide, F64, F64)
    exact = {**_named(exact_ys), **gradients(exact_ys, wide, [dy.double() for dy in dys])}
    return {name: (value, composed[name], exact[name]) for name, value in actual.items()}


def check_group(case: GroupCase, values: int = 0) -> None:
    """Every y and gradient within the budget, in the right dtype and shape."""
    check_results(case, results, values)


QKV = (
    Part(N=48, R=5, p=0.1, bias=True, lora_bias=True),
    Part(N=16, R=8, p=0.5, scaling=0.7),
    Part(N=17, R=3, p=0.0, bias=True),
)
DORA = (
    Part(N=33, R=6, p=0.0, bias=True, lora_bias=True, magnitude=True),
    Part(N=20, R=4, p=0.3, bias=True, lora_bias=True, magnitude=True),
    Part(N=31, R=4, p=0.3),
)
BATCH = (
    Part(R=5, p=0.1, bias=True, lora_bias=True),
    Part(R=8, p=0.5, scaling=0.7),
    Part(R=3, p=0.0, lora_bias=True),
    Part(R=16, p=0.2),
)
TELLING = (
    GroupCase(QKV),
    GroupCase(QKV, x=BF16, data=1),
    GroupCase(DORA, data=2),
    GroupCase(DORA, compute=BF16, data=3),
    GroupCase(BATCH, batch=True, data=4),
    GroupCase(BATCH, batch=True, named="rows", data=5),
    GroupCase(BATCH, batch=True, named="leading", compute=BF16, data=6),
)
