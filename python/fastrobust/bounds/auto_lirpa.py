"""The names of auto_LiRPA on top of ``compute_bounds``: change ``from auto_LiRPA import`` to ``from
fastrobust.bounds.auto_lirpa import``.

Covered: BoundedModule(model, dummy_input, bound_opts={"relu" | "activation_bound_option": "adaptive" | "same-slope"})
and options that change speed alone; BoundedTensor(x, PerturbationLpNorm(norm, eps | x_L, x_U)), whose perturbation
stays with its copies; and compute_bounds(x=(bounded,), C=..., method="IBP" | "CROWN-IBP" | "IBP+backward" | "CROWN" |
"backward" | "CROWN-Optimized" | "alpha-CROWN", IBP=..., bound_lower, bound_upper, return_A), without x for the tensor
that the model was last called with. Of optimize_bound_args iteration, lr_alpha and lr_decay count. Not covered, with an
error that says so: forward mode, several inputs, perturbed weights, other perturbations, intermediate bounds given from
outside, bounds of inner nodes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.bounds.api import compute_bounds
from fastrobust.bounds.checks import as_tensor, check_norm
from fastrobust.bounds.slopes import SlopeSearch

__all__ = ["BoundedModule", "BoundedTensor", "PerturbationLpNorm"]

_METHODS = {
    "ibp": "ibp", "crown-ibp": "crown-ibp", "ibp+backward": "crown-ibp", "crown": "crown", "backward": "crown",
    "crown-optimized": "alpha-crown", "alpha-crown": "alpha-crown",
}  # fmt: skip
_COVERED = "IBP, CROWN-IBP (IBP+backward), CROWN (backward), CROWN-Optimized (alpha-CROWN)"
_LINES = ("adaptive", "same-slope")
# options that change how fast or with how many words the bounds come, or only what optimised bounds are, not what these
# are
_HARMLESS = (
    "batched_crown_max_vram_ratio",
    "buffers",
    "conv_mode",
    "crown_batch_size",
    "deterministic",
    "matmul",
    "max_crown_size",
    "sparse_conv_intermediate_bounds",
    "sparse_features_alpha",
    "sparse_intermediate_bounds",
    "sparse_intermediate_bounds_with_ibp",
    "sparse_spec_alpha",
    "use_full_conv_alpha",
    "use_full_conv_alpha_thresh",
    "verbosity",
)
_HARMLESS_ARGUMENTS = ("reuse_ibp", "cache_bounds")


class PerturbationLpNorm:
    """||d||_norm <= eps, or for norm = inf the box [x_L, x_U] (eps gives an end that is missing). For other norms the
    ball alone counts, as in auto_LiRPA."""

    def __init__(
        self,
        eps: Any = 0,
        norm: float = math.inf,
        x_L: Tensor | None = None,
        x_U: Tensor | None = None,
        eps_min: Any = 0,
    ):
        if eps_min:
            raise ValueError(f"eps_min: got {eps_min}, which is not covered, expected 0")
        self.eps, self.norm, self.x_L, self.x_U = as_tensor(eps), check_norm(norm), x_L, x_U

    def __repr__(self) -> str:
        return f"PerturbationLpNorm(norm={self.norm}, eps={self.eps})"

    def like(self, x: Tensor) -> PerturbationLpNorm:
        """With its tensors of x's type and device."""
        eps, low, high = (t.to(x) if isinstance(t, Tensor) else t for t in (self.eps, self.x_L, self.x_U))
        return PerturbationLpNorm(eps, self.norm, low, high)


# what gives the same examples again, of another type, device or place in memory
_COPIES = {
    getattr(Tensor, name)
    for name in (
        "clone",
        "contiguous",
        "cpu",
        "cuda",
        "detach",
        "detach_",
        "double",
        "float",
        "pin_memory",
        "requires_grad_",
        "to",
        "type",
        "type_as",
    )
} | {torch.clone, torch.detach}


class BoundedTensor(Tensor):
    """A tensor with a perturbation ``ptb``, which copies of it keep; what is computed from it is a plain tensor."""

    ptb: PerturbationLpNorm | None

    @staticmethod
    def __new__(cls, x: Tensor, ptb: PerturbationLpNorm | None = None) -> BoundedTensor:
        out = _plain(x).as_subclass(cls)
        out.ptb = ptb
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func not in _COPIES or not isinstance(args[0], BoundedTensor) or not isinstance(out, Tensor):
            return out
        if out is args[0]:
            return out
        ptb = args[0].ptb
        return BoundedTensor(out, None if ptb is None else ptb.like(_plain(out)))


def _plain(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


class BoundedModule(nn.Module):
    """Bounds of a model under auto_LiRPA's names; calling it runs the model."""

    input_name = ["/input"]
    output_name = ["/output"]

    def __init__(
        self,
        model: nn.Module,
        global_input: Any = None,
        bound_opts: dict[str, Any] | None = None,
        device: Any = "auto",
        verbose: bool = False,
        custom_ops: Any = None,
    ):
        super().__init__()
        if custom_ops:
            raise ValueError(f"custom_ops: got {sorted(map(str, custom_ops))}, which are not covered, expected None")
        self.model = model if device is None or device == "auto" else model.to(device)
        self.same_slope = False
        self.search = SlopeSearch()
        self.last: BoundedTensor | None = None  # what the model was last called with
        self.set_bound_opts(bound_opts or {})

    def set_bound_opts(self, bound_opts: dict[str, Any]) -> None:
        """Changes options; those that are not named stay."""
        self._set_search(bound_opts.get("optimize_bound_args") or {})
        options = {
            k: v
            for k, v in bound_opts.items()
            if k not in (*_HARMLESS, "optimize_bound_args") and v is not None and v is not False
        }
        choices = [options.pop(k) for k in ("activation_bound_option", "relu") if k in options]
        if any(c not in _LINES for c in choices):
            raise ValueError(f"bound_opts: got lines {choices[0]!r}, which are not covered, expected one of {_LINES}")
        if options:
            raise ValueError(
                f"bound_opts: got {sorted(options)}, which are not covered, expected activation_bound_option, relu or "
                f"options of speed ({', '.join(_HARMLESS)})"
            )
        if choices:
            self.same_slope = choices[0] == "same-slope"

    def _set_search(self, given: dict[str, Any]) -> None:
        """optimize_bound_args; those that only change what is kept or how it is stored are taken as they are."""
        names = {"iteration": "iterations", "lr_alpha": "lr", "lr_decay": "decay"}
        self.search = dataclasses.replace(self.search, **{names[k]: v for k, v in given.items() if k in names})

    def forward(self, *x: Any, method_opt: str = "forward", **options: Any) -> Any:
        """The model's output; ``method_opt="compute_bounds"`` is ``compute_bounds``, as in auto_LiRPA."""
        if method_opt == "compute_bounds":
            return self.compute_bounds(*x, **options)
        if method_opt != "forward":
            raise ValueError(f"method_opt: got {method_opt!r}, expected 'forward' or 'compute_bounds'")
        if len(x) == 1 and isinstance(x[0], BoundedTensor):
            self.last = x[0]
        return self.model(*(_plain(t) if isinstance(t, BoundedTensor) else t for t in x), **options)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """The model's own, without a prefix, as in auto_LiRPA."""
        return self.model.state_dict(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        return self.model.load_state_dict(*args, **options)

    def compute_bounds(
        self,
        x: Any = None,
        aux: Any = None,
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
        given = {"aux": aux, "forward": forward, **{k: v for k, v in other.items() if k not in _HARMLESS_ARGUMENTS}}
        if given.get("final_node_name") in self.output_name:
            del given["final_node_name"]
        refused = sorted(k for k, v in given.items() if not (v is None or v is False or v == {}))
        if refused:
            raise ValueError(f"compute_bounds: got {refused}, which are not covered, expected the methods {_COVERED}")
        for out, inputs in (needed_A_dict or {}).items():
            if out not in self.output_name or set(inputs or ()) - set(self.input_name):
                raise ValueError(f"needed_A_dict: got {out!r}, which is not covered, expected the output and the input")
        bounded = self._bounded(x)
        if not (bound_lower or bound_upper):
            raise ValueError("bound_lower: got False, and bound_upper False too, expected at least one side")
        name = ("ibp" if IBP else "backward") if method is None else str(method).lower()
        if name not in _METHODS:
            raise ValueError(f"method: got {method!r}, which is not covered, expected one of {_COVERED}")
        ours = "crown-ibp" if IBP and name == "backward" else _METHODS[name]
        if self.same_slope:
            ours = {"crown-ibp": "ibp-linear", "crown": "fast-lin"}.get(ours, ours)
        if return_A and ours == "ibp":
            raise ValueError("return_A: got True with method IBP, which has no linear bounds, expected a CROWN method")
        point, eps, norm = _set_of(bounded)
        sides = "both" if bound_lower and bound_upper else "lower" if bound_lower else "upper"
        found = compute_bounds(
            self.model, point, eps, norm=norm, method=ours, spec=None if C is None else C.to(point), sides=sides,
            return_linear=return_A, slopes=self.search if ours == "alpha-crown" else None,
        )  # fmt: skip
        if found.linear is None:
            return found.lower, found.upper
        linear = found.linear
        keep = {
            "lA": linear.lower_A, "lbias": linear.lower_b, "uA": linear.upper_A, "ubias": linear.upper_b,
        }  # fmt: skip
        return found.lower, found.upper, {self.output_name[0]: {self.input_name[0]: keep}}

    def _bounded(self, x: Any) -> BoundedTensor:
        """The one tensor with a perturbation: ``x``, or what the model was last called with."""
        inputs = x if isinstance(x, (tuple, list)) else (self.last if x is None else x,)
        if len(inputs) != 1:
            raise ValueError(f"x: got {len(inputs)} inputs, which are not covered, expected one BoundedTensor")
        one = inputs[0]
        if not isinstance(one, BoundedTensor) or one.ptb is None:
            raise ValueError(
                f"x: got {type(one).__name__} without a perturbation, expected one BoundedTensor with a "
                "PerturbationLpNorm "
                "(or none, after the model was called with one)"
            )
        if not isinstance(one.ptb, PerturbationLpNorm):
            raise ValueError(f"x: got {type(one.ptb).__name__}, which is not covered, expected a PerturbationLpNorm")
        return one


def _set_of(x: BoundedTensor) -> tuple[Tensor, float | Tensor, float]:
    """(centre, eps, norm); a box around x becomes its centre and a radius per element."""
    assert x.ptb is not None
    point = _plain(x)
    ptb = x.ptb.like(point)
    if ptb.norm != math.inf or (ptb.x_L is None and ptb.x_U is None):
        return point, ptb.eps, ptb.norm
    low, high = (
        point + sign * ptb.eps if end is None else end.expand_as(point) for end, sign in ((ptb.x_L, -1), (ptb.x_U, 1))
    )
    if not bool((low <= high).all()):
        raise ValueError("x_L: got values above x_U, expected x_L <= x_U")
    return 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low, math.inf
