"""Whether a program computes what the model computes, on the input that came: outputs at once, gradients as they
come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as leaves

from .._places import wave
from .._record import ModelMismatchError

# What float32 rounding of two orders of the same sums explains, in units of the last place of the largest output.
ULPS = 4096
# Relative to the norm of a gradient; more where a sum near zero lies on the other side of a kink.
GRADIENT = 2e-3
_GRADIENT = (
    "model: its gradient with respect to the input is not that of what was frozen; custom autograd functions, hooks on "
    "gradients and in-place changes under no_grad cannot be frozen: attack the model itself"
)
_WHY = "does forward leave torch, or has the model changed since freeze() or update()?"

Call = Callable[[Sequence[Tensor]], Any]  # the model itself on other tensors


# Operations whose results are sums that another order of addition changes.
_SUMS = frozenset((
    "convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "native_batch_norm", "mean", "sum",
    "masked_conv2d", "masked_conv2d_input_grad",
))  # fmt: skip


class _Rounding(TorchDispatchMode):
    """Moves every sum by the order of its rounding error: what networks do that amplify it on the way.

    Batch normalisation of a channel that is constant (no kept weight leads to it) has a variance of about zero, and
    multiplies its rounding by 300; the input tells nothing of that.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name.rpartition("::")[2] not in _SUMS:
            return out
        first = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(first, Tensor) or not first.is_floating_point() or not first.numel():
            return out
        channels = [d for d in range(first.dim()) if d != 1]
        size = first.abs().amax(channels, keepdim=True) if channels else first.abs().amax()
        moved = first + 2.0**-23 * size * wave(first)
        return moved if first is out else (moved, *out[1:])


def nudged(tensors: Sequence[Tensor], by: float) -> list[Tensor]:
    """Moved by the order of rounding errors, up and down."""
    return [t * (1 + by * wave(t)) if t.is_floating_point() else t for t in tensors]


def rows(tensors: Sequence[Any], batch: int, begin: int, end: int) -> list[Any]:
    """Those examples of what has one row per example."""
    return [t[begin:end] if isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == batch else t for t in tensors]


def outputs(call: Call, tensors: Sequence[Tensor], got: list[Any], every: bool) -> bool:
    """Raises ModelMismatchError where ``got`` are not the model's outputs beyond rounding; False where nothing was
    finite.

    One example unless ``every``; all of them where one alone comes out differently, as in models that mix examples.
    """
    batch = tensors[0].shape[0] if tensors[0].dim() else 1
    with torch.no_grad():
        if not every and batch > 1:
            one = rows(tensors, batch, 0, 1)
            try:
                want = leaves(call(one))
                if _apart(rows(got, batch, 0, 1), want) is None:
                    return any(bool(torch.isfinite(w).any()) for w in want if isinstance(w, Tensor))
            except Exception:
                pass  # a model that takes no single example
        want = leaves(call(tensors))
        problem = _apart(got, want)
        if problem is None:
            return any(not w.numel() or bool(torch.isfinite(w).any()) for w in want if isinstance(w, Tensor))
        # What rounding of the input alone does, in networks that amplify it.
        if _apart(got, want, leaves(call(nudged(tensors, 2.0**-22)))) is None:
            return True
        with _Rounding():
            moved = leaves(call(tensors))
        if _apart(got, want, moved) is None:
            return True
    raise ModelMismatchError(f"model: its outputs are not those of what was frozen ({problem}); {_WHY}")


def _apart(got: Sequence[Any], want: Sequence[Any], moved: Sequence[Any] | None = None) -> str | None:
    """How two outputs differ beyond rounding; None where they do not."""
    if len(got) != len(want):
        return f"{len(got)} values, expected {len(want)}"
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        if not isinstance(w, Tensor) or not isinstance(g, Tensor):
            if type(g) is not type(w) or g != w:
                return f"{g!r}, expected {w!r}"
            continue
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"{tuple(g.shape)} of {g.dtype}, expected {tuple(w.shape)} of {w.dtype}"
        if not w.numel():
            continue
        m = w if moved is None else moved[i]
        g, w, m = (t.detach().double() if t.dtype != torch.complex64 else torch.view_as_real(t) for t in (g, w, m))
        finite = torch.isfinite(w) & torch.isfinite(m)
        if not bool(finite.any()):
            continue
        g, w, m = g[finite], w[finite], m[finite]
        room = ULPS * 2.0**-23 * float(w.abs().amax()) + 64 * float((m - w).abs().amax())
        far = float((g - w).abs().amax())
        if not far <= room:
            return f"they differ by {far:.3g}, rounding explains {room:.1g}"
    return None


class GradientProof:
    """Compares the first gradient that comes back with the model's own for the same gradient of the outputs.

    ``inputs()`` are what the program is to run on; ``watch`` its outputs. Neither is kept: their hooks lead back here,
    and Python's collector does not see through the hooks of a graph.
    """

    def __init__(self, call: Call, tensors: Sequence[Tensor], done: Callable[[], None], every: bool) -> None:
        self.call, self.done, self.every = call, done, every
        self.tensors = [t.detach() for t in tensors]
        self.wanted = [t.requires_grad for t in tensors]
        self.grads: dict[int, Tensor] = {}
        self.found: dict[int, Tensor] = {}

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of them, whose gradients are noted."""
        views = [t.view_as(t) if w else t for t, w in zip(tensors, self.wanted, strict=True)]
        for i, (t, w) in enumerate(zip(views, self.wanted, strict=True)):
            if w:
                t.register_hook(self._taker(self.found, i, self._check))
        return views

    def watch(self, outs: list[Any]) -> list[Any]:
        """The outputs to hand out: tensors of their own, whose gradients are those of the outputs alone."""
        given = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in outs]
        for i, leaf in enumerate(given):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._taker(self.grads, i, None))
        if all(g is o for g, o in zip(given, outs, strict=True)):  # no gradient will come
            ones = {
                i: torch.ones_like(t) for i, t in enumerate(outs) if isinstance(t, Tensor) and t.is_floating_point()
            }
            if any(bool(g.any()) for g in self._gradient(self.tensors, ones).values()):
                raise ModelMismatchError(_GRADIENT)
            self.done()
        return given

    @staticmethod
    def _taker(into: dict[int, Tensor], i: int, then: Callable[[], None] | None) -> Callable[[Tensor], None]:
        def take(grad: Tensor) -> None:
            into[i] = grad.detach()
            if then is not None:
                then()

        return take

    def _check(self) -> None:
        if len(self.found) < sum(self.wanted) or not self.grads:
            return
        if torch._C._is_any_autocast_enabled():
            return  # a backward inside of autocast rounds plain layers to half precision: the next one tells
        found, grads, self.found, self.grads = dict(self.found), dict(self.grads), {}, {}
        batch = self.tensors[0].shape[0] if self.tensors[0].dim() else 1
        if not self.every and batch > 1:
            one = [{i: g[:1] for i, g in d.items()} for d in (found, grads)]
            try:
                if self._near(rows(self.tensors, batch, 0, 1), *one):
                    self.done()
                    return
            except Exception:
                pass  # a model that takes no single example
        if not self._near(self.tensors, found, grads):
            raise ModelMismatchError(_GRADIENT)
        self.done()

    def _near(self, tensors: Sequence[Tensor], found: dict[int, Tensor], grads: dict[int, Tensor]) -> bool:
        want = self._gradient(tensors, grads)
        misses = [_miss(found[i], w) for i, w in want.items()]
        if all(not bool((m > 0).any()) for m in misses):
            return True
        # Sides of kinks that rounding decides: a false program is wrong nearly everywhere. Moved both ways, since a sum
        # next to a kink crosses it in one direction alone.
        moved = [self._gradient(nudged(tensors, sign * 2.0**by), grads) for by in (-20, -18) for sign in (1, -1)]
        with _Rounding():
            moved.append(self._gradient(tensors, grads))
        for (i, w), miss in zip(want.items(), misses, strict=True):
            noise = torch.stack([_miss(m[i], w) for m in moved]).amax(0)
            wrong = miss > 8 * noise.clamp_min(0)
            if float(wrong.double().mean()) > (0.5 if len(wrong) > 2 else 0):
                return False
        return True

    def _gradient(self, tensors: Sequence[Tensor], grads: dict[int, Tensor]) -> dict[int, Tensor]:
        with torch.enable_grad():
            given = [t.detach().requires_grad_(w) for t, w in zip(tensors, self.wanted, strict=True)]
            made = leaves(self.call(given))
            outs = [i for i in grads if made[i].requires_grad]
            chosen = [t for t, w in zip(given, self.wanted, strict=True) if w]
            if not outs:
                back: Sequence[Tensor | None] = [None] * len(chosen)
            else:
                back = torch.autograd.grad([made[i] for i in outs], chosen, [grads[i] for i in outs], allow_unused=True)
        at = [i for i, w in enumerate(self.wanted) if w]
        return {i: torch.zeros_like(t) if g is None else g for i, g, t in zip(at, back, chosen, strict=True)}


def _miss(found: Tensor, want: Tensor) -> Tensor:
    """Per example, by how much of the norm two gradients differ beyond GRADIENT; 0 where they agree."""
    f, w = (t.detach().double().reshape(t.shape[0] if t.dim() else 1, -1) for t in (found, want))
    if f.shape != w.shape:
        return torch.ones(1, dtype=torch.float64)
    if not w.numel():
        return w.new_zeros(1)
    error, size = (f - w).norm(dim=1), w.norm(dim=1)
    near = (error <= GRADIENT * size + 1e-12 * size.nan_to_num().amax()) | ~torch.isfinite(size)
    return torch.where(near, 0.0, (error / size.clamp_min(1e-300)).nan_to_num(nan=float("inf")))
