"""SparseProp (Nikdan et al. 2023), sparse convolutions and linear layers with backward passes on the CPU.

It is right only for batches of whole eights, one group, no dilation and at least one kept weight, and knows no CUDA;
other rows are skipped. Its own choice between its two kernels is used, which times both once. Build it from a checkout
or from the registry with ``pip install --no-deps --no-build-isolation sparseprop`` (needs scipy).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..case import Call, Unavailable
from . import require


def convolution(weight: Tensor, x: Tensor, stride: int, padding: int, gradient: bool) -> Call:
    """The convolution of x, or the input gradient for the output as gradient."""
    library = require("sparseprop.modules", "--no-deps --no-build-isolation sparseprop")
    if x.is_cuda:
        raise Unavailable("serves the CPU only")
    if x.shape[0] % 8:
        raise Unavailable("is wrong for batches that are no multiple of 8")
    if not weight.any():
        raise Unavailable("crashes on a layer without weights")
    out, channels, kernel, _ = weight.shape
    dense = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    with torch.no_grad():
        dense.weight.copy_(weight)
    layer = library.sparsify_conv2d_auto(dense, tuple(x.shape))
    x = x.detach().clone()
    if not gradient:
        with torch.no_grad():
            layer(x)
        return torch.no_grad()(lambda: layer(x))
    x.requires_grad_()
    y = layer(x)
    return lambda: torch.autograd.grad(y, x, y.detach(), retain_graph=True)[0]
