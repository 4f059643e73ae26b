"""The numerics contract as one comparison, and data on which it means something."""

import torch
from torch import Tensor


def assert_within_budget(name: str, actual: Tensor, composed: Tensor, exact: Tensor) -> None:
    """error(actual) <= 2 * (error of the same formula composed of torch ops in that dtype + one rounding of the largest value).

    Args:
        actual: what is tested. composed: the same formula by torch ops in the dtype under test. exact: in float64.
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if exact.numel() == 0:
        return
    if not torch.isfinite(actual.double()).all():
        bad = (~torch.isfinite(actual.double())).sum().item()
        raise AssertionError(f"{name}: {bad} of {actual.numel()} values are not finite")
    error = (actual.double() - exact).abs().max().item()
    composed_error = (composed.double() - exact).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item()
    budget = 2 * (composed_error + rounding)
    if error > budget:
        raise AssertionError(
            f"{name}: error {error:.3e} over the budget {budget:.3e} = 2 * ({composed_error:.3e} composed + {rounding:.3e})"
        )
