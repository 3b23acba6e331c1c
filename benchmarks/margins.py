"""Margins of a problem (network, images, labels) in L-inf as timed calls: ours and auto_LiRPA's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds

from .case import Call
from .peers import auto_lirpa

Problem = tuple[nn.Module, Tensor, Tensor]


def ours(given: Callable[[], Problem], eps: float, method: str, backward: bool) -> Call:
    """Lower bounds; with ``backward`` the gradients of their sum with respect to the parameters, too."""
    net, x, y = given()

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            low = compute_bounds(net, x, eps, method=method, labels=y, sides="lower").lower
            if backward:
                for p in net.parameters():
                    p.grad = None
                low.sum().backward()
        return low.detach()

    return call


def peer(given: Callable[[], Problem], eps: float, method: str, backward: bool) -> Call:
    net, x, y = given()
    return auto_lirpa.margins(net, x, y, 10, eps=eps, norm=math.inf, method=method, backward=backward)
