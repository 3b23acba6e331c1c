"""Batch norm in certified training: the statistics of the clean batch, fixed while bounds are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = dict[_BatchNorm, tuple[Tensor, Tensor]]  # mean and biased variance of the batch, (C,), recorded


def clean_pass(model: nn.Module, x: Tensor) -> tuple[Tensor, Statistics]:
    """The logits of the clean batch in the model's own mode (its running statistics move once), and what every batch
    norm in train mode saw. Both take part in the gradient."""
    seen: Statistics = {}

    def look(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, _BatchNorm)
        if layer.training:
            dims = [d for d in range(given[0].dim()) if d != 1]
            seen[layer] = given[0].mean(dims), given[0].var(dims, unbiased=False)

    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    handles = [m.register_forward_pre_hook(look) for m in layers]
    try:
        return model(x), seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def fixed(model: nn.Module, seen: Statistics) -> Iterator[None]:
    """The model in eval mode, its batch norms as the affine maps that they were for the clean batch.

    (v - mean) / sqrt(var + e) * weight + bias is written as a weight and a bias beside the mean 0 and the variance 1 -
    e, because torch takes no gradient for running statistics.
    """
    modes = [(m, m.training) for m in model.modules()]
    kept = [(m, m._parameters["weight"], m._parameters["bias"], dict(m._buffers)) for m in seen]
    try:
        for m, (mean, var) in seen.items():
            factor = (var + m.eps).rsqrt()
            weight, bias = m._parameters["weight"], m._parameters["bias"]
            factor = factor if weight is None else factor * weight
            shift = -mean * factor
            m._parameters["weight"] = factor  # type: ignore[assignment]
            m._parameters["bias"] = shift if bias is None else shift + bias  # type: ignore[assignment]
            with torch.no_grad():
                m._buffers["running_mean"] = torch.zeros_like(mean)
                m._buffers["running_var"] = torch.full_like(var, 1 - m.eps)
        model.eval()
        yield
    finally:
        for m, weight, bias, buffers in kept:
            m._parameters["weight"], m._parameters["bias"] = weight, bias
            m._buffers.update(buffers)
        for module, mode in modes:
            module.training = mode
