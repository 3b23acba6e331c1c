"""Argument checks shared by the ops. Each error names the argument, what came and what is expected."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, NamedTuple

import numpy as np
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
        if value.is_nested:
            return f"nested {value.dtype} tensor"
        kind = "" if value.layout == torch.strided else f"{value.layout} "
        return f"{tuple(value.shape)} {kind}{value.dtype} tensor on {value.device}"
    if isinstance(value, np.ndarray):
        return f"ndarray of shape {value.shape} and type {value.dtype}"
    return " ".join(f"{type(value).__name__} {value!r}"[:160].split())[:80]


def parse_norm(norm: Any) -> float:
    """1.0, 2.0 or inf."""
    try:
        return NORMS[norm]
    except (KeyError, TypeError):
        raise ValueError(f"norm: got {describe(norm)}, expected 1, 2 or inf (or 'L1', 'L2', 'Linf')") from None


def parse_clip(clip: Any, name: str = "clip") -> tuple[float, float]:
    """(lo, hi), one number each; None is the whole line. :func:`_box.parse_box` takes tensors too."""
    if clip is None:
        return -math.inf, math.inf
    try:
        lo, hi = (float(c) for c in clip)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {describe(clip)}, expected (lo, hi) or None") from None
    if not lo <= hi:
        raise ValueError(f"{name}: got ({lo}, {hi}), expected lo <= hi")
    return lo, hi


def need_tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        hint = "; torch.from_numpy makes one" if isinstance(value, np.ndarray) else ""
        raise TypeError(f"{name}: got {describe(value)}, expected a tensor{hint}")
    return value


def need_dense(value: Any, name: str) -> Tensor:
    """A tensor with elements at strides: not sparse, not nested."""
    t = need_tensor(value, name)
    if t.layout != torch.strided or t.is_nested:
        kind = "nested tensor" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name}: got {kind}, expected a strided (dense) tensor")
    return t


def check_state(x: Any, name: str) -> Tensor:
    """The images: float32 (float64 for checking), at least one dimension, dense."""
    x = need_dense(x, name)
    if x.dtype not in (torch.float32, torch.float64):
        hint = "; scale integer images to [0, 1] first" if not x.dtype.is_floating_point else "; gradients may be half"
        raise TypeError(f"{name}: got {describe(x)}, expected float32{hint}")
    if x.dim() == 0:
        raise ValueError(f"{name}: got a 0-dimensional tensor, expected examples along the first dimension")
    return x


def check_like(t: Any, name: str, x: Tensor, x_name: str, dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """Same shape and device as x, and one of the dtypes (x's own by default)."""
    t = need_dense(t, name)
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
    active = need_dense(active, "active")
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


def as_tensor(value: Any, name: str, device: torch.device, expected: str) -> Tensor:
    """A float64 tensor of a list or numpy array of numbers."""
    try:
        if not isinstance(value, (np.ndarray, list, tuple)):
            raise TypeError
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}") from None
    return torch.as_tensor(array.astype(np.float64), device=device)


def check_parameter(value: Any, name: str, x: Tensor, norm: float) -> Parameter:
    """A number >= 0, one per example, or (for norm inf) one per element: whatever broadcasts to x's shape by numpy's
    rule, except that (B,) is one per example. CPU values are checked; reading a CUDA tensor's values would stop the
    device, so there a negative or NaN radius acts as an empty ball."""
    if isinstance(value, (numbers.Real, torch.SymFloat)) and not isinstance(value, bool):
        number = float(value)
        if not number >= 0:
            raise ValueError(f"{name}: got {number}, expected a number >= 0")
        return Parameter(None, number)
    if not isinstance(value, Tensor):
        value = as_tensor(value, name, x.device, "a number >= 0 or a tensor")
    need_dense(value, name)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: got {describe(value)}, expected a floating-point tensor or a number")
    if value.device != x.device:
        if value.dim() > 0:
            raise ValueError(f"{name}: got device {value.device}, expected x's device {x.device}")
        value = value.to(x.device)
    shape = _parameter_shape(value, name, x)
    if len(shape) > 1 and norm != math.inf:
        raise ValueError(f"{name}: got one value per element, expected a number or one per example for norm {norm:g}")
    # not (v >= 0) catches NaN too
    if value.device.type == "cpu" and has_values(value) and bool((~(value >= 0)).any()):
        raise ValueError(f"{name}: got negative or NaN values, expected values >= 0")
    value = _to_state_dtype(value, x.dtype, name)
    if tuple(value.shape) != shape:
        value = (value.reshape(-1) if len(shape) == 1 else value).expand(shape)
    return Parameter(value, 0.0)


def _parameter_shape(value: Tensor, name: str, x: Tensor) -> tuple[int, ...]:
    """(B,) for one value per example or for all, x's shape for one per element."""
    have, want = tuple(value.shape), tuple(x.shape)
    if have == want[:1] or value.numel() == 1:
        return want[:1]
    if have == want:
        return want
    if fits(have, want) and len(have) > 1:
        return want[:1] if len(have) == len(want) and have == (want[0], *[1] * (len(want) - 1)) else want
    raise ValueError(
        f"{name}: got shape {have}, expected a number, ({want[0]},) one per example, or a shape that broadcasts to "
        f"x's {want}, with as many dimensions as x or one example"
    )


def fits(have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Does a shape broadcast to that of a batch, with the dimensions of the batch or of one example?"""
    if len(have) not in (len(want), len(want) - 1):
        return False
    return all(n in (1, m) for n, m in zip(have, want[len(want) - len(have) :], strict=True))


def check_finite(parameter: Parameter, name: str, why: str) -> None:
    """Refuses an infinite radius; a CUDA tensor's values are not read."""
    t = parameter.tensor
    if parameter.value == math.inf or (
        t is not None and t.device.type == "cpu" and has_values(t) and bool(torch.isinf(t).any())
    ):
        raise ValueError(f"{name}: got an infinite value, expected a finite radius: {why}")


_plain = (Tensor, torch.nn.Parameter)
_wrapped_by_transform = torch._C._functorch.is_functorch_wrapped_tensor
_keys_of = torch._C._dispatch_keys
_tracing = torch._C._get_tracing_state


def has_values(t: Tensor) -> bool:
    """False for fake, meta and traced tensors, whose values and addresses cannot be asked for, and for wrapped ones."""
    if torch.compiler.is_compiling() or t.is_meta or _tracing() is not None or _wrapped_by_transform(t):
        return False
    return type(t) in _plain or not _keys_of(t).has(torch._C.DispatchKey.Python)


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


def check_integer(value: Any, name: str, expected: str = "an integer") -> Any:
    """Any integral number, as torch and numpy take them; a symbolic one of a compiled graph as it is."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    try:
        if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}") from None


def check_values_in_box(x: Tensor, name: str, lo: Any, hi: Any) -> None:
    """lo and hi: numbers, or tensors that broadcast. Reads all of x. The attacks call it once on their input; the ops,
    which run in every step, do not."""
    if x.numel() == 0:
        return
    outside = ~((x >= lo) & (x <= hi))  # holds NaN too
    if not bool(outside.any()):
        return
    # short where that says it all, with every digit else
    least, most = (f"{v:g}" if float(f"{v:g}") == v else repr(v) for v in (t.item() for t in torch.aminmax(x)))
    count = int(outside.sum())
    if isinstance(lo, Tensor) or isinstance(hi, Tensor):
        box = "clip (tensors)"
        mend = "torch.minimum(torch.maximum(x, lo), hi)"
    else:
        box = f"clip = ({lo:g}, {hi:g})"
        mend = f"x.clamp({lo:g}, {hi:g})"
    raise ValueError(
        f"{name}: got values from {least} to {most}, expected values in {box} ({count} of {x.numel()} lie outside); "
        f"{mend} mends what rounding left outside; otherwise scale the images (and give normalize= for a model that "
        "wants other units), or pass clip=None"
    )


def check_labels(labels: Any, name: str, batch: int, classes: int | None, device: torch.device) -> Tensor:
    """(B,) int64 class indices; values are read on the CPU only (and by the attacks, once, on any device)."""
    labels = need_dense(labels, name)
    if labels.dtype == torch.bool or labels.dtype.is_floating_point or labels.dtype.is_complex:
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
            f"{name}: got class indices from {least.item()} to {most.item()}, expected 0 to {classes - 1} ({classes} "
            "classes)"
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
