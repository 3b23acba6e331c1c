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


def products_of_torch_change() -> bool:
    """Whether the matrix library behind ``@`` gives other bits with other threads, as MKL 2024.2 does on an AMD EPYC
    for left sides of 5 or 10 rows: gradients of weights are its products."""
    g = torch.Generator().manual_seed(0)
    before, found = torch.get_num_threads(), []
    a, b = torch.randn(10, 280, generator=g), torch.randn(280, 12, generator=g)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([a[:rows, :k] @ b[:k] for rows in (5, 10) for k in (70, 280)])
    finally:
        torch.set_num_threads(before)
    return not all(map(torch.equal, *found))


@pytest.mark.parametrize("name", ["mlp-relu", "mlp-tanh", "cnn"])
@pytest.mark.parametrize("method", ONE_PASS)
@pytest.mark.parametrize("p", [math.inf, 2.0])
def test_threads_change_no_bit(name: str, method: str, p: float) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = found(name, method, p, 1)
    torch.set_rng_state(state)
    two = found(name, method, p, 2)
    changes = products_of_torch_change()
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        if i >= 3 and changes:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a, b)
