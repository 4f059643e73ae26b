"""Where the sizes come from: the linear layers of published models, squares, and any NxK."""

import re
from dataclasses import dataclass

SQUARES = (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Shape:
    """A weight ``[n, k]`` and the layers that have it."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Model:
    """The fields of a model's configuration that size its linear layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def projections(self) -> dict[str, tuple[int, int]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


# config.json of the models of these names on the Hugging Face hub.
MODELS = {
    "llama3-8b": Model(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128),
    "llama3-70b": Model(hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128),
    "qwen3-8b": Model(hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_dim=128),
    "gemma2-9b": Model(hidden=3584, intermediate=14336, heads=16, kv_heads=8, head_dim=256),
}


def model_shapes(name: str) -> list[Shape]:
    """The distinct weights of a model; layers of one size are named together."""
    named: dict[tuple[int, int], list[str]] = {}
    for projection, size in MODELS[name].projections().items():
        named.setdefault(size, []).append(projection.removesuffix("_proj"))
    return [Shape(f"{name}:{'+'.join(layers)}", *size) for size, layers in named.items()]


def parse(text: str) -> list[Shape]:
    """``llama3-8b``, ``llama3-8b:k`` (or ``:k_proj``), ``squares``, ``2048`` (a square) or ``1024x4096`` (N x K).

    Raises:
        ValueError: none of these.
    """
    model, _, layer = text.partition(":")
    if model in MODELS:
        layer = layer.removesuffix("_proj")
        found = [
            shape for shape in model_shapes(model) if not layer or layer in shape.name.partition(":")[2].split("+")
        ]
        if found:
            return found
    elif text == "squares":
        return [Shape(f"square:{size}", size, size) for size in SQUARES]
    elif text.isdigit() and int(text) > 0:
        return [Shape(f"square:{text}", int(text), int(text))]
    elif (size := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)) is not None:
        return [Shape(text, int(size[1]), int(size[2]))]
    raise ValueError(
        f"expected squares, NxK, a size, or one of {', '.join(MODELS)} with or without :layer, got {text!r}"
    )
