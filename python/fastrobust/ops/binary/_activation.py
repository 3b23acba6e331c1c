"""Elementwise activations behind a sum of a masked layer: what the kernels apply in the same write, defined in
torch."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of csrc/binary/args.h.
KINDS = (
    "none", "relu", "leaky_relu", "hardtanh", "silu", "gelu", "gelu_tanh", "hardswish", "elu", "tanh", "sigmoid",
    "hardsigmoid", "softplus", "mish",
)  # fmt: skip
_SIDED = ("relu", "leaky_relu", "hardtanh")


@dataclasses.dataclass(frozen=True)
class Act:
    """An activation of `kind`, one of KINDS, with its parameters.

    leaky_relu: a is the slope below 0. hardtanh: least value a, largest b (ReLU6 is 0 and 6). elu: a is alpha.
    softplus: a is beta, b the threshold. gelu is the exact one, gelu_tanh its approximation by tanh.
    """

    kind: str
    a: float = 0.0
    b: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")

    @property
    def code(self) -> tuple[int, float, float]:
        """As the compiled module takes it."""
        return KINDS.index(self.kind), float(self.a), float(self.b)

    @property
    def sided(self) -> bool:
        """Whether the derivative is 1 on the open side, and `slope` elsewhere: one bit tells it.

        Open is an argument x > 0, for hardtanh a < x < b.
        """
        return self.kind in _SIDED

    @property
    def slope(self) -> float:
        """The derivative of a sided activation on its closed side."""
        return float(self.a) if self.kind == "leaky_relu" else 0.0

    @property
    def by_value(self) -> bool:
        """Whether the result tells the side as well as the argument does."""
        return self.sided and self.slope >= 0

    def __call__(self, x: Tensor) -> Tensor:
        """The activation of x as a new tensor."""
        return x.clone() if self.kind == "none" else self._apply(x, False)

    def inplace(self, x: Tensor) -> Tensor:
        """The activation of x, whose memory may be overwritten."""
        return self._apply(x, True)

    def _apply(self, x: Tensor, inplace: bool) -> Tensor:
        a, b = self.a, self.b
        match self.kind:
            case "none":
                return x
            case "relu":
                return F.relu(x, inplace)
            case "leaky_relu":
                return F.leaky_relu(x, a, inplace)
            case "hardtanh":
                return F.hardtanh(x, a, b, inplace)
            case "silu":
                return F.silu(x, inplace)
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "hardswish":
                return F.hardswish(x, inplace)
            case "elu":
                return F.elu(x, a, inplace)
            case "tanh":
                return x.tanh_() if inplace else x.tanh()
            case "sigmoid":
                return x.sigmoid_() if inplace else x.sigmoid()
            case "hardsigmoid":
                return F.hardsigmoid(x, inplace)
            case "softplus":
                return F.softplus(x, a, b)
            case _:
                return F.mish(x, inplace)

    def gradient(self, grad: Tensor, arg: Tensor) -> Tensor:
        """grad * derivative of the activation at arg."""
        a, b, aten = self.a, self.b, torch.ops.aten
        found: Tensor
        match self.kind:
            case "none":
                return grad
            case "relu":
                found = aten.threshold_backward(grad, arg, 0)
            case "leaky_relu":
                found = aten.leaky_relu_backward(grad, arg, a, False)
            case "hardtanh":
                found = aten.hardtanh_backward(grad, arg, a, b)
            case "silu":
                found = aten.silu_backward(grad, arg)
            case "gelu":
                found = aten.gelu_backward(grad, arg)
            case "gelu_tanh":
                found = aten.gelu_backward(grad, arg, approximate="tanh")
            case "hardswish":
                found = aten.hardswish_backward(grad, arg)
            case "elu":
                found = aten.elu_backward(grad, a, 1, 1, False, arg)
            case "tanh":
                found = aten.tanh_backward(grad, arg.tanh())
            case "sigmoid":
                found = aten.sigmoid_backward(grad, arg.sigmoid())
            case "hardsigmoid":
                found = aten.hardsigmoid_backward(grad, arg)
            case "softplus":
                found = aten.softplus_backward(grad, arg, a, b)
            case _:
                found = aten.mish_backward(grad, arg)
        return found


NONE = Act("none")
RELU = Act("relu")
