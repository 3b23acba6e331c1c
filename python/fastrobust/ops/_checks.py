"""Argument checks shared by the ops. Each error names the argument, what came and what is expected."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

NORMS: dict[Any, float] = {
    math.inf: math.inf, 2: 2.0, 1: 1.0,
    "inf": math.inf, "Linf": math.inf, "linf": math.inf,
    "2": 2.0, "L2": 2.0, "l2": 2.0,
    "1": 1.0, "L1": 1.0, "l1": 1.0,
}  # fmt: skip


def describe(value: Any) -> str:
    """A short description of what came, for errors."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} tensor on {value.device}"
    return f"{type(value).__name__} {value!r}"[:80]


def parse_norm(norm: Any) -> float:
    """1.0, 2.0 or inf."""
    try:
        return NORMS[norm]
    except (KeyError, TypeError):
        raise ValueError(f"norm: got {describe(norm)}, expected 1, 2 or inf (or 'L1', 'L2', 'Linf')") from None


def parse_clip(clip: Any, name: str = "clip") -> tuple[float, float]:
    """(lo, hi); None is the whole line."""
    if clip is None:
        return -math.inf, math.inf
    try:
        lo, hi = (float(c) for c in clip)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {describe(clip)}, expected (lo, hi) or None") from None
    if not lo <= hi:
        raise ValueError(f"{name}: got ({lo}, {hi}), expected lo <= hi")
    return lo, hi


def need_tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, expected a tensor")
    return value


def check_state(x: Any, name: str) -> Tensor:
    """The images: float32 (float64 for checking), at least one dimension, dense."""
    x = need_tensor(x, name)
    if x.dtype not in (torch.float32, torch.float64):
        hint = "; scale integer images to [0, 1] first" if not x.dtype.is_floating_point else "; gradients may be half"
        raise TypeError(f"{name}: got {describe(x)}, expected float32{hint}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got layout {x.layout}, expected a strided (dense) tensor")
    if x.dim() == 0:
        raise ValueError(f"{name}: got a 0-dimensional tensor, expected examples along the first dimension")
    return x


def check_like(t: Any, name: str, x: Tensor, x_name: str, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """Same shape and device as x, and one of the dtypes (x's own by default)."""
    t = need_tensor(t, name)
    dtypes = dtypes or (x.dtype,)
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: got {describe(t)}, expected {' or '.join(map(str, dtypes))}, as {x_name} has")
    if t.shape != x.shape:
        raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {x_name}'s shape {tuple(x.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name}: got device {t.device}, expected {x_name}'s device {x.device}")
    return t


def check_active(active: Any, x: Tensor) -> Tensor | None:
    if active is None:
        return None
    active = need_tensor(active, "active")
    if active.dtype != torch.bool:
        raise TypeError(f"active: got {describe(active)}, expected a bool tensor")
    if tuple(active.shape) != (x.shape[0],):
        raise ValueError(f"active: got shape {tuple(active.shape)}, expected ({x.shape[0]},), one per example")
    if active.device != x.device:
        raise ValueError(f"active: got device {active.device}, expected x's device {x.device}")
    return active


class Parameter(NamedTuple):
    """A step size or radius: a number, or a tensor with one value per example or per element."""

    tensor: Tensor | None
    value: float


def check_parameter(value: Any, name: str, x: Tensor, norm: float) -> Parameter:
    """A float >= 0, a (B,) tensor, or (for norm inf) a tensor of x's shape. CPU values are checked; reading a CUDA
    tensor's values would stop the device, so there a negative or NaN radius acts as an empty ball."""
    if isinstance(value, Tensor):
        if value.device != x.device and value.dim() > 0:
            raise ValueError(f"{name}: got device {value.device}, expected x's device {x.device}")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: got {describe(value)}, expected a floating-point tensor or a number")
        if value.dim() == 0:
            value = value.to(x.device).expand(x.shape[0])
        elif tuple(value.shape) != (x.shape[0],):
            if value.shape != x.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, expected a number, ({x.shape[0]},) or x's {tuple(x.shape)}"
                )
            if norm != math.inf:
                raise ValueError(
                    f"{name}: got one value per element, expected a number or one per example for norm {norm:g}"
                )
        # not (v >= 0) catches NaN too
        if value.device.type == "cpu" and has_values(value) and bool((~(value >= 0)).any()):
            raise ValueError(f"{name}: got negative or NaN values, expected values >= 0")
        return Parameter(_to_state_dtype(value, x.dtype, name), 0.0)
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name}: got {describe(value)}, expected a number >= 0 or a tensor")
    number = float(value)
    if not number >= 0:
        raise ValueError(f"{name}: got {number}, expected a number >= 0")
    return Parameter(None, number)


def check_finite(parameter: Parameter, name: str) -> None:
    """Refuses an infinite radius; a CUDA tensor's values are not read."""
    t = parameter.tensor
    if parameter.value == math.inf or (
        t is not None and t.device.type == "cpu" and has_values(t) and bool(torch.isinf(t).any())
    ):
        raise ValueError(
            f"{name}: got an infinite value, expected a finite radius: there is no uniform point of an unbounded set"
        )


def has_values(t: Tensor) -> bool:
    """False for fake, meta and traced tensors, whose values and addresses cannot be asked for."""
    return not torch.compiler.is_compiling() and not t.is_meta and type(t) in (Tensor, torch.nn.Parameter)


def _to_state_dtype(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """float64 radii become float32 downwards, so that the float32 ball lies inside the one asked for."""
    near = value.detach().to(dtype)
    if name != "eps" or value.dtype == dtype or value.dtype.itemsize <= dtype.itemsize:
        return near
    return torch.where(near.to(value.dtype) > value, torch.nextafter(near, torch.full_like(near, -math.inf)), near)


def check_number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {describe(value)}, expected a number")
    number = float(value)
    if not (low <= number <= high):
        raise ValueError(f"{name}: got {number}, expected a number from {low:g} to {high:g}")
    return number


def check_values_in_box(x: Tensor, name: str, lo: float, hi: float) -> None:
    """Reads all of x. The attacks call it once on their input; the ops, which run in every step, do not."""
    if x.numel() == 0:
        return
    least, most = (t.item() for t in torch.aminmax(x))
    if not (least >= lo and most <= hi):
        raise ValueError(
            f"{name}: got values from {least:g} to {most:g}, expected values in clip = ({lo:g}, {hi:g}); "
            "scale the images (and give normalize= for a model that wants other units), or pass clip=None"
        )


def check_labels(labels: Any, name: str, batch: int, classes: int | None, device: torch.device) -> Tensor:
    """(B,) int64 class indices; values are read on the CPU only (and by the attacks, once, on any device)."""
    labels = need_tensor(labels, name)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name}: got {describe(labels)}, expected integer class indices")
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, expected ({batch},), one class index per example")
    if labels.device != device:
        raise ValueError(f"{name}: got device {labels.device}, expected {device}")
    if classes is not None:
        check_label_values(labels, name, classes)
    return labels


def check_label_values(labels: Tensor, name: str, classes: int) -> None:
    if labels.numel() == 0:
        return
    least, most = torch.aminmax(labels)
    if least.item() < 0 or most.item() >= classes:
        raise ValueError(
            f"{name}: got class indices from {least.item()} to {most.item()}, expected 0 to {classes - 1} ({classes} classes)"
        )


def dense_format(x: Tensor) -> torch.memory_format | None:
    """The memory format in which x is dense with examples outermost, or None."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def lay_out(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """t's values in memory in that format, without lazy negation or conjugation."""
    return t.resolve_neg().contiguous(memory_format=memory_format)
