"""What the sparse delta's benchmarks count, by hand."""

import dataclasses

import torch

from benchmarks import layers, registry, sparse_delta
from benchmarks.registry import Case, Cost

OPS = registry.load()
CASE = Case("sparse_delta_linear", "", 8, 32, 64, 0, "bfloat16", 0.0, "cpu", "fwd", density=0.05)


def test_costs() -> None:
    assert sparse_delta.active(CASE) == 102
    # x 8*64*2, W 32*64*2, y 8*32*2, values and indices 4 each; one product.
    forward = Cost(1024 + 4096 + 512 + 8 * 102, 2 * 8 * 32 * 64)
    # dy, W, dx; x again; values, indices and dvalues; a product, and 2 M S.
    backward = Cost(512 + 4096 + 1024 + 1024 + 12 * 102, 2 * 8 * 32 * 64 + 2 * 8 * 102)
    assert sparse_delta.cost(CASE, "whole", nf4=False) == forward
    assert sparse_delta.cost(dataclasses.replace(CASE, mode="bwd"), "whole", nf4=False) == backward
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    assert sparse_delta.cost(dataclasses.replace(CASE, mode="full"), "whole", nf4=False) == both
    assert sparse_delta.cost(CASE, "frozen", nf4=True) == Cost(1024 + layers.nf4_bytes(32, 64) + 512, 32768)
    assert OPS["sparse_delta_dvalues"].cost(CASE, "whole") == Cost(8 * 96 * 2 + 8 * 102, 2 * 8 * 102)
    assert OPS["sparse_adamw"].cost(CASE, "whole") == Cost(102 * 40, 0)


def test_the_delta_is_as_large_as_the_base() -> None:
    case = dataclasses.replace(CASE, m=64, n=256, k=256)
    inputs = OPS["sparse_delta_linear"].inputs(case, torch.Generator().manual_seed(0))
    x, weight, indices = inputs["x"].float(), inputs["weight"].float(), inputs["pattern"].indices.long()
    delta = torch.zeros(256 * 256).index_put((indices,), inputs["values"]).view(256, 256)
    assert 0.8 < (x @ delta.T).std() / (x @ weight.T).std() < 1.25
