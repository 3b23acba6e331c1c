"""Outward rounding: bounds that hold in real arithmetic and for every float32 evaluation order of the network.

The propagation runs in float64 and carries, per layer, a bound on what float32 evaluation of that layer can add. For a
layer with n products per output, any order of float32 additions, with or without fused multiply-add, satisfies (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1)

    |fl(W x + b) - (W x + b)| <= gamma_(n+2) (|W| |x| + |b|) + (n + 2) 2^-125,      gamma_k = k u / (1 - k u),  u =
    2^-24,

the last term covering underflow, also where subnormals are flushed to zero (there |W| and |x| count 2^-102 more, for
factors that are flushed before they meet a large one). Where the right side overflows float32 the error is infinite.
This slack is enlarged by 2^-10 of itself: the float64 propagation's own errors obey the same inequality with u = 2^-53,
which is less than 2^-28 of it. Lines, boxes and radii, which carry no float32 slack of their own, are enlarged by 2^-30
of their size for the same purpose.

Activations: ReLU, hardtanh and ReLU6 are exact in float32; the others are taken to be computed within 8 units in the
last place of |s(x)| (sigmoid, tanh, arctan, ELU, leaky ReLU) or of |s(x)| + |x| (softplus, SiLU, GELU). Algorithms that
are not an evaluation order of the definition (Winograd or Fourier convolutions, TF32, half precision) are not covered.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.region import Box

_U = 2.0**-24
_TINY = 2.0**-125
_FLUSHED = 2.0**-102  # 2^-126 / u: what gamma turns into the largest number that is flushed
_LARGEST = (2.0 - 2.0**-23) * 2.0**127
RELATIVE = 2.0**-30
_EXACT = ("relu", "hardtanh", "relu6")
_RELATIVE_TO_VALUE = ("sigmoid", "tanh", "arctan", "elu", "leaky_relu")


def gamma(n: int) -> float:
    """n u / (1 - n u), enlarged for the errors of the float64 propagation."""
    if n * _U >= 0.25:
        raise ValueError(f"model: a layer sums {n} products, too many for float32 error bounds")
    return n * _U / (1 - n * _U) * (1 + 2.0**-10)


def magnitude(box: Box) -> Tensor:
    l, u = box.ends
    return torch.maximum(l.abs(), u.abs())


def slack(node: G.LinearNode, inputs: list[Tensor]) -> Tensor | None:
    """Bound of the float32 error of a linear node whose inputs have these magnitudes; None where it is exact, infinite
    where a float32 sum may overflow."""
    if isinstance(node, (G.Dense, G.Conv, G.ConvTranspose)):
        # factors that are subnormal may be flushed, whatever they meet: each counts as at least _FLUSHED / u
        w, b, m = node.get_weight().abs() + _FLUSHED, node.get_bias(), inputs[0] + _FLUSHED
        n = w[0].numel()
        if isinstance(node, G.Dense):
            size = F.linear(m, w, None if b is None else b.abs())
        elif isinstance(node, G.Conv):
            size = F.conv2d(m, w, None if b is None else b.abs(), node.stride, node.padding, node.dilation, node.groups)
        else:
            n = w.numel() // max(1, w.shape[1])
            size = node._apply(m, w, None if b is None else b.abs())
        return _error(n + 2, size)
    if isinstance(node, G.Scale):
        f, size = node.get_factor(), inputs[0] + _FLUSHED
        size = size if f is None else size * (f.to(size).abs() + _FLUSHED)
        shift = node.shift_size()
        # the factors of a normalisation are themselves computed in float32
        return _error(16, size if shift is None else size + shift.to(size))
    if isinstance(node, G.Sum):
        return _error(len(inputs), torch.stack(inputs).sum(0))
    if isinstance(node, G.Monotone) and node.taps:
        return _error(node.taps + 2, node.function(inputs[0] + _FLUSHED).abs())
    return None


def _error(n: int, size: Tensor) -> Tensor:
    """Of a float32 sum of n terms whose absolute values sum to at most ``size``."""
    found = gamma(n) * size + n * _TINY
    return torch.where(size + found < _LARGEST, found, torch.full_like(found, math.inf))


def rows_error(matrix: Tensor, reach: Tensor) -> Tensor:
    """The float32 error (R,) of rows (R, K) times outputs of magnitude ``reach`` (R, K). A difference of two outputs,
    or one alone, is rounded once, which moves no number past a float32 bound."""
    sizes = matrix.abs()
    exact = ((sizes == 0) | (sizes == 1)).all(1) & (sizes.sum(1) <= 2)
    error = _error(matrix.shape[1] + 2, ((sizes + _FLUSHED) * (reach + _FLUSHED)).sum(1))
    return torch.where(exact, torch.zeros_like(error), error)


def log_softmax_error(box: Box) -> tuple[Tensor, Tensor]:
    """Of outputs z - max - log(sum exp) that float32 computes from z (B, K) in ``box``: how large they may be, and what
    each is wrong by, both (B,). max and the logarithm are one number for all outputs of an example, whatever they are
    rounded to: that number falls out of margins, and what stays are the roundings of the two subtractions, of numbers
    no larger than max z - min z + log K."""
    l, u = box.ends
    size = (u.flatten(1).amax(1) - l.flatten(1).amin(1)) + math.log(max(1, l[0].numel())) + 1.0
    return size, _error(4, size)


def activation_error(node: G.Activation, box: Box, value: Tensor) -> Tensor | float:
    """Bound of the float32 error of an activation, for inputs in ``box`` and values of at most ``value``."""
    if node.activation in _EXACT:
        return 0.0
    size = value if node.activation in _RELATIVE_TO_VALUE else value + magnitude(box)
    return 16 * _U * size + 16 * _TINY


def widen(box: Box, by: Tensor | float) -> Box:
    l, u = box.ends
    return Box((l - by, u + by))


def pad_lines(slopes: Tensor, intercepts: Tensor, box: Box, error: Tensor | float) -> Tensor:
    """Intercepts moved outwards by the rounding errors of the lines, of their use, and of the activation itself."""
    m = magnitude(box)
    pad = RELATIVE * (slopes.abs().amax(0) * m + intercepts.abs().amax(0) + m) + error
    return torch.stack([intercepts[0] - pad, intercepts[1] + pad])


def _round(x: Tensor, towards: float) -> Tensor:
    near = x.to(torch.float32)
    wrong = (near.to(x.dtype) > x) if towards < 0 else (near.to(x.dtype) < x)
    return torch.where(wrong, torch.nextafter(near, torch.full_like(near, towards)), near)


def round_down(x: Tensor) -> Tensor:
    """The largest float32 not above each float64."""
    return _round(x, -math.inf)


def round_up(x: Tensor) -> Tensor:
    return _round(x, math.inf)
