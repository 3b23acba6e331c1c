"""Neither bounds nor gradients depend on the number of threads: no sum is split by it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastrobust.bounds import compute_bounds

from .nets import ONE_PASS, make


def found(name: str, method: str, p: float, threads: int) -> list[Tensor]:
    net, shape = make(name)
    x, y = torch.rand(70, *shape), torch.randint(5, (70,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            plain = compute_bounds(net, x, 0.03, norm=p, clip=(0, 1), method=method)
        assert plain.upper is not None
        margins = compute_bounds(net, x, 0.03, norm=p, clip=(0, 1), method=method, labels=y, sides="lower").lower
        # with l2 balls a convolution's weight has torch's own gradient, whose sums torch splits by threads
        grads = torch.autograd.grad(margins.square().sum(), list(net.parameters())) if p == math.inf else ()
    finally:
        torch.set_num_threads(before)
    return [plain.lower, plain.upper, margins.detach(), *grads]


@pytest.mark.parametrize("name", ["mlp-relu", "mlp-tanh", "cnn"])
@pytest.mark.parametrize("method", ONE_PASS)
@pytest.mark.parametrize("p", [math.inf, 2.0])
def test_threads_change_no_bit(name: str, method: str, p: float) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = found(name, method, p, 1)
    torch.set_rng_state(state)
    two = found(name, method, p, 2)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
