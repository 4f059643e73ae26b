"""S2FT (arXiv 2412.06289): whole heads and FFN channels trained as dense slabs, side by side after a permutation that changes no
output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.sparse_pattern import SparsePattern
from ..nn.hooks import replace
from ..nn.sparse_delta import SparseDeltaLinear


@dataclass
class _Coupled:
    """Layers that share a dimension made of units (groups of heads, or channels). ``rows``: layers whose rows it is, with the rows of a
    unit; the columns are those of ``parent.name``, ``width`` a unit. ``order``: new place of a unit -> old place."""

    rows: list[tuple[nn.Linear, int]]
    parent: nn.Module
    name: str
    width: int
    order: Tensor
    chosen: int


class S2FT:
    """Makes a transformer train the input columns of its attention's and FFN's output layers that belong to some heads and channels.

    Blocks are modules with ``self_attn.{q,k,v,o}_proj`` and ``mlp.{gate,up,down}_proj``, as in transformers' Llama, Mistral and Qwen2,
    or BERT's layers; all of these are nn.Linear, and beside them attention and FFN hold no weights but norms of a single head. Heads
    move in groups that share a key and value head, the rows of q, k and v with the columns of o; channels move as rows of gate and up
    with columns of down. The trained part then lies side by side, so that its gradient is one product with a slice of x, the only part
    of x that is saved. Everything else is frozen.

    Args:
        model: any module with such blocks. Its output layers are replaced in place.
        head_ratio, channel_ratio: parts of the head groups and channels that are trained, in (0, 1]; at least one of each.
        resident: hold the deltas in the weights (see :class:`peftfast.nn.SparseDeltaLinear`).
        generator: of the random choice, on the CPU.

    Attributes:
        layers: name -> :class:`SparseDeltaLinear`.

    Raises:
        TypeError, ValueError: no such block, a layer of another kind, or a ratio out of range; nothing is changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        head_ratio: float = 0.05,
        channel_ratio: float = 0.02,
        resident: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        for name, ratio in (("head_ratio", head_ratio), ("channel_ratio", channel_ratio)):
            if isinstance(ratio, bool) or not isinstance(ratio, int | float):
                raise TypeError(f"{name}: expected a number, got {type(ratio).__name__}")
            if not 0.0 < ratio <= 1.0:
                raise ValueError(f"{name}: expected a part in (0, 1], got {ratio}")
        coupled: list[tuple[str, _Coupled]] = []
        for path, block in model.named_modules():
            if hasattr(getattr(block, "self_attn", None), "q_proj") and hasattr(
                getattr(block, "mlp", None), "down_proj"
            ):
                attention: Any = block.self_attn
                ffn: Any = block.mlp
                layers = tuple(_linear(attention, f"{name}_proj") for name in "qkvo")
                width = getattr(attention, "head_dim", None)
                _check_shared(attention, layers, width)
                heads = _heads(layers, attention, "o_proj", width, head_ratio, generator)
                coupled.append((f"{path}.self_attn.o_proj", heads))
                wide, down = [_linear(ffn, "gate_proj"), _linear(ffn, "up_proj")], _linear(ffn, "down_proj")
                _check_shared(ffn, (*wide, down), None)
                channels = _channels(wide, down, ffn, "down_proj", channel_ratio, generator)
                coupled.append((f"{path}.mlp.down_proj", channels))
            elif hasattr(getattr(getattr(block, "attention", None), "self", None), "query"):
                inner: Any = block.attention.self  # type: ignore[union-attr]
                outer: Any = block.attention.output  # type: ignore[union-attr]
                last: Any = block.output
                layers = (*(_linear(inner, name) for name in ("query", "key", "value")), _linear(outer, "dense"))
                _check_shared(inner, layers, inner.attention_head_size)
                heads = _heads(layers, outer, "dense", inner.attention_head_size, head_ratio, generator)
                coupled.append((f"{path}.attention.output.dense", heads))
                wide = [_linear(block.intermediate, "dense")]  # type: ignore[arg-type]
                _check_shared(block.intermediate, tuple(wide), None)  # type: ignore[arg-type]
                channels = _channels(wide, _linear(last, "dense"), last, "dense", channel_ratio, generator)
                coupled.append((f"{path}.output.dense", channels))
        if not coupled:
            raise ValueError("model: expected blocks of Llama's or BERT's shape, got none")
        _check_alone(model, coupled, resident)
        model.requires_grad_(False)
        self.layers: dict[str, SparseDeltaLinear] = {}
        self._coupled = dict(coupled)
        for name, group in coupled:
            linear = getattr(group.parent, group.name)
            _permute(group, linear, group.order)
            columns = torch.arange(group.chosen * group.width)
            pattern = SparsePattern.from_columns(columns, (linear.out_features, linear.in_features))
            self.layers[name] = SparseDeltaLinear.from_linear(linear, indices=pattern, resident=resident)
            replace(model, name, self.layers[name])
        self._permuted = True

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [layer.delta_values for layer in self.layers.values()]

    @torch.no_grad()
    def restored(self) -> dict[str, tuple[SparsePattern, Tensor]]:
        """Name of a layer -> its pattern in the weight as it was before the permutation, and the values there ``[pattern.count]``, in
        float32 on the layer's device. Nothing is changed."""
        found = {}
        for name, group in self._coupled.items():
            layer = self.layers[name]
            values = layer.delta_values.detach().reshape(layer.out_features, -1)
            if self._permuted:
                columns, order = _expanded(group.order[: group.chosen], group.width).sort()
                pattern = SparsePattern.from_columns(columns, (layer.out_features, layer.in_features))
                found[name] = pattern, values[:, order.to(values.device)].reshape(-1)
            else:
                found[name] = layer.pattern, values.reshape(-1)
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Put heads and channels back where they were: base weights are then torch.equal to the model's own, and the deltas lie on the
        same columns as before the permutation. To be called before saving but by ``peftfast.save_adapter``, which writes these
        columns either way; does nothing the second time. An optimiser's states do not follow."""
        if not self._permuted:
            return
        for name, (pattern, values) in self.restored().items():
            group, layer = self._coupled[name], self.layers[name]
            was_merged = layer.merged
            layer.unmerge()
            _permute(group, layer, torch.argsort(group.order))
            layer.delta_indices = pattern.indices.to(layer.weight.device)
            layer._pattern = pattern.to(layer.weight.device)
            layer.delta_values.copy_(values)
            if was_merged:
                layer.merge()
        self._permuted = False


def _check_alone(model: nn.Module, coupled: list[tuple[str, _Coupled]], resident: bool) -> None:
    """Each weight that is permuted belongs to one layer: two would move it twice, and one outside its block would not move with it."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter.data_ptr()] = owners.get(parameter.data_ptr(), 0) + (not parameter.is_meta)
    seen: set[int] = set()
    for name, group in coupled:
        last = getattr(group.parent, group.name)
        if resident and not last.weight.is_contiguous():
            raise ValueError(f"resident: {name}: expected a contiguous weight")
        for linear in (*(linear for linear, _ in group.rows), last):
            if id(linear) in seen or owners.get(linear.weight.data_ptr(), 0) > 1:
                raise ValueError(
                    f"model: expected layers with a weight of their own, got {name} on one that others share"
                )
            seen.add(id(linear))


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = getattr(module, name, None)
    if not isinstance(found, nn.Linear) or not found.weight.is_floating_point() or isinstance(found, SparseDeltaLinear):
        raise TypeError(f"{name}: expected an nn.Linear with a floating weight, got {type(found).__name__}")
    return found


def _check_shared(module: nn.Module, layers: tuple[nn.Linear, ...], head: Any) -> None:
    """A weight beside the layers would stay where it is while heads or channels move past it: only what all heads share may be there,
    a norm or an embedding of the size of one."""
    known = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for name, parameter in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        of_one = parameter.dim() == 1 or isinstance(owner, nn.Embedding)
        if id(parameter) in known or (name.count(".") == 1 and of_one and parameter.shape[-1] == head):
            continue
        raise ValueError(
            f"model: {type(module).__name__}.{name} of shape {tuple(parameter.shape)} has places for heads or channels, which s2ft "
            "would move past it"
        )


def _chosen_first(total: int, ratio: float, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """An order of ``total`` things whose first ones, ascending, are the chosen."""
    count = max(1, round(ratio * total))
    shuffled = torch.randperm(total, generator=generator)
    return torch.cat((shuffled[:count].sort().values, shuffled[count:].sort().values)), count


def _expanded(order: Tensor, width: int) -> Tensor:
    return (order[:, None] * width + torch.arange(width)).reshape(-1)


def _heads(
    layers: tuple[nn.Linear, ...],
    parent: nn.Module,
    name: str,
    width: Any,
    ratio: float,
    generator: torch.Generator | None,
) -> _Coupled:
    q, k, v, o = layers
    if not isinstance(width, int) or k.out_features % width or q.out_features % k.out_features:
        raise ValueError(f"attention: expected a head size that divides its projections, got {width}")
    if v.out_features != k.out_features or o.in_features != q.out_features:
        raise ValueError("attention: expected k and v of one size, and o as wide as q")
    groups = k.out_features // width
    wide = q.out_features // groups
    order, count = _chosen_first(groups, ratio, generator)
    return _Coupled([(q, wide), (k, width), (v, width)], parent, name, wide, order, count)


def _channels(
    wide: list[nn.Linear],
    down: nn.Linear,
    parent: nn.Module,
    name: str,
    ratio: float,
    generator: torch.Generator | None,
) -> _Coupled:
    if any(layer.out_features != down.in_features for layer in wide):
        raise ValueError("FFN: expected its first layers as wide as the last takes in")
    order, count = _chosen_first(down.in_features, ratio, generator)
    return _Coupled([(layer, 1) for layer in wide], parent, name, 1, order, count)


@torch.no_grad()
def _permute(group: _Coupled, columns: nn.Linear, order: Tensor) -> None:
    """Take units of rows and of columns in ``order``, in place: new place -> old place."""
    for linear, width in group.rows:
        taken = _expanded(order, width).to(linear.weight.device)
        linear.weight.copy_(linear.weight.index_select(0, taken))
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.index_select(0, taken))
    columns.weight.copy_(columns.weight.index_select(1, _expanded(order, group.width).to(columns.weight.device)))
