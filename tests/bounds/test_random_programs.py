"""Models as people write them, at random: bounds hold for the model itself, or it is refused; never anything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastrobust.bounds import compute_bounds

from .nets import ONE_PASS
from .programs import N, Program


def runs(model: nn.Module, x: torch.Tensor) -> bool:
    try:
        model(x.clone())
    except RuntimeError:  # torch itself does not allow it
        return False
    return True


@settings(max_examples=8 * settings().max_examples)  # hundreds by default, thousands in the thorough profile
@given(st.integers(0, 2**32 - 1), st.sampled_from(ONE_PASS))
def test_bounds_are_of_the_model(seed: int, method: str) -> None:
    model = Program(seed).eval()
    with torch.no_grad():
        x = torch.randn(3, N)
        if not runs(model, x):
            return
        want = model(x.clone())
        centre = compute_bounds(model, x, 0.0, method=method)
        scale = 1e-4 * (1 + want.abs().max())
        assert (centre.lower - want).abs().max() <= scale and (centre.upper - want).abs().max() <= scale
        found = compute_bounds(model, x, 0.2, method=method)
        z = torch.stack([model(x + 0.2 * (2 * torch.rand_like(x) - 1)) for _ in range(30)])
        assert (z >= found.lower - scale).all() and (z <= found.upper + scale).all()


@given(st.integers(0, 2**32 - 1))
def test_what_changes_between_calls_is_seen(seed: int) -> None:
    model = Program(seed).eval()
    with torch.no_grad():
        x = torch.randn(2, N)
        if not runs(model, x):
            return
        compute_bounds(model, x, 0.1)
        model.table["gain"], model.config.shift, model.flags[0] = -2.0, -0.4, not model.flags[0]
        want, found = model(x.clone()), compute_bounds(model, x, 0.0)
        assert (found.lower - want).abs().max() <= 1e-4 * (1 + want.abs().max())


@pytest.mark.parametrize("seed", range(4))
def test_wrapped_programs(seed: int) -> None:
    model = Program(seed).eval()
    with torch.no_grad():
        x = torch.randn(2, N)
        want = compute_bounds(model, x, 0.1, method="crown")
        for wrapped in (nn.DataParallel(model), nn.Sequential(model, nn.Identity()), torch.compile(model)):
            got = compute_bounds(wrapped, x, 0.1, method="crown")
            torch.testing.assert_close(got.lower, want.lower)
