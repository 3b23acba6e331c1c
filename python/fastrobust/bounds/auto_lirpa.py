"""The names of auto_LiRPA on top of ``compute_bounds``: change ``from auto_LiRPA import`` to ``from fastrobust.bounds.auto_lirpa import``.

Covered: BoundedModule(model, dummy_input, bound_opts={"relu" | "activation_bound_option": "adaptive" | "same-slope"}),
BoundedTensor(x, PerturbationLpNorm(norm, eps | x_L, x_U)), and compute_bounds(x=(bounded,), C=..., method="IBP" | "CROWN-IBP" | "CROWN" |
"backward", IBP=..., bound_lower, bound_upper, return_A). Not covered, with an error that says so: optimised bounds (alpha-CROWN), forward
mode, several inputs, perturbed weights, other perturbations, intermediate bounds given from outside.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.bounds.api import compute_bounds

__all__ = ["BoundedModule", "BoundedTensor", "PerturbationLpNorm"]

_COVERED = "IBP, CROWN-IBP, CROWN, backward"


class PerturbationLpNorm:
    """||d||_norm <= eps, or for norm = inf the box [x_L, x_U]."""

    def __init__(
        self, eps: float | Tensor = 0, norm: float = math.inf, x_L: Tensor | None = None, x_U: Tensor | None = None
    ):
        if (x_L is None) != (x_U is None):
            raise ValueError("x_L: give both x_L and x_U, or neither")
        if x_L is not None and norm != math.inf:
            raise ValueError(f"x_L: a box goes with norm=inf, got norm={norm}")
        self.eps, self.norm, self.x_L, self.x_U = eps, float(norm), x_L, x_U

    def __repr__(self) -> str:
        return f"PerturbationLpNorm(norm={self.norm}, eps={self.eps})"


class BoundedTensor(Tensor):
    """A tensor with a perturbation."""

    ptb: PerturbationLpNorm | None
    source: Tensor

    @staticmethod
    def __new__(cls, x: Tensor, ptb: PerturbationLpNorm | None = None) -> BoundedTensor:
        out: Any = torch.Tensor._make_subclass(cls, x, x.requires_grad)
        out.ptb, out.source = ptb, x
        return out


class BoundedModule(nn.Module):
    """Bounds of a model under auto_LiRPA's names; calling it runs the model."""

    input_name = ["/input"]
    output_name = ["/output"]

    def __init__(self, model: nn.Module, global_input: Any = None, bound_opts: dict[str, Any] | None = None, device: Any = None, verbose: bool = False):  # fmt: skip
        super().__init__()
        self.model = model if device is None else model.to(device)
        options = dict(bound_opts or {})
        choice = options.pop("activation_bound_option", options.pop("relu", "adaptive"))
        options.pop("conv_mode", None)  # patches or matrix: chosen here by cost
        if choice not in ("adaptive", "same-slope"):
            raise ValueError(
                f"bound_opts: activation bound option {choice!r} is not covered; covered: 'adaptive', 'same-slope'"
            )
        if options:
            raise ValueError(
                f"bound_opts: {sorted(options)} are not covered; covered: activation_bound_option, relu, conv_mode"
            )
        self.same_slope = choice == "same-slope"

    def forward(self, x: Tensor, *args: Any) -> Any:
        return self.model(getattr(x, "source", x), *args)

    def compute_bounds(
        self,
        x: Any = None,
        C: Tensor | None = None,
        method: str | None = "backward",
        IBP: bool = False,
        forward: bool = False,
        bound_lower: bool = True,
        bound_upper: bool = True,
        return_A: bool = False,
        needed_A_dict: Any = None,
        **other: Any,
    ) -> tuple[Any, ...]:
        """(lower, upper), with None for a side that is not asked for; with ``return_A`` also the linear bounds,
        {output: {input: {"lA", "lbias", "uA", "ubias"}}}."""
        if forward or other:
            raise ValueError(f"compute_bounds: {sorted(other) or ['forward']} not covered; covered methods: {_COVERED}")
        inputs = x if isinstance(x, (tuple, list)) else (x,)
        if len(inputs) != 1 or not isinstance(inputs[0], BoundedTensor) or inputs[0].ptb is None:
            raise ValueError("x: expected one BoundedTensor with a PerturbationLpNorm")
        if not (bound_lower or bound_upper):
            raise ValueError("bound_lower: at least one side must be asked for")
        name = "IBP" if IBP and method is None else str(method)
        ours = {"ibp": "ibp", "crown-ibp": "crown-ibp", "crown": "crown", "backward": "crown"}.get(name.lower())
        if IBP and name.lower() == "backward":
            ours = "crown-ibp"
        if ours is None:
            raise ValueError(f"method: {method!r} is not covered; covered: {_COVERED}")
        if self.same_slope:
            ours = {"crown-ibp": "ibp-linear", "crown": "fast-lin"}.get(ours, ours)
        point, eps, norm = _set_of(inputs[0])
        sides = "both" if bound_lower and bound_upper else "lower" if bound_lower else "upper"
        found = compute_bounds(
            self.model, point, eps, norm=norm, method=ours, spec=C, sides=sides,
            return_linear=return_A and ours != "ibp",
        )  # fmt: skip
        if not return_A:
            return found.lower, found.upper
        linear = found.linear
        if linear is None:
            raise ValueError("return_A: method IBP has no linear bounds")
        keep = {
            "lA": linear.lower_A, "lbias": linear.lower_b, "uA": linear.upper_A, "ubias": linear.upper_b,
        }  # fmt: skip
        return found.lower, found.upper, {self.output_name[0]: {self.input_name[0]: keep}}


def _set_of(x: BoundedTensor) -> tuple[Tensor, float | Tensor, float]:
    """(centre, eps, norm); a box around x becomes its centre and a radius per element."""
    ptb = x.ptb
    assert ptb is not None
    if ptb.x_L is None or ptb.x_U is None:
        return x.source, ptb.eps, ptb.norm
    return 0.5 * (ptb.x_L + ptb.x_U), 0.5 * (ptb.x_U - ptb.x_L), math.inf
