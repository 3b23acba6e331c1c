"""Tensors that show another tensor's elements at given places of its memory, made with ordinary view operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._places import Place
from .._record import UnreadableModelError

View = Callable[[Tensor], Tensor]


def looking(whole: Place, part: Place) -> View | None:
    """What turns a tensor whose elements are those of ``whole`` into the tensor at ``part``; None where they are one.

    The tensor may lie in memory in any way: places speak of the elements, in the order of the recorded memory.
    """
    if whole == part:
        return None
    if whole.dense():
        simple = _sliced(whole, part)
        if simple is not None:
            return simple
        if whole.row_major() and part.row_major() and part.numel == whole.numel and part.offset == whole.offset:
            size = part.size
            return lambda t: t.reshape(size)
        split = _split(whole, part)
        if split is not None:
            return split
    index = _index(whole, part)
    return lambda t: t.reshape(-1)[index.to(t.device)]


def overlaying(known: Place, new: Place) -> Callable[[Tensor, Tensor], Tensor]:
    """f(old, t): old, whose elements are those of ``known`` (or the whole memory up to its end, as one row), with t at
    ``new``."""
    if known.dense():
        order = _order(known)
        lengths = [known.size[d] for d in order]
        back = [order.index(d) for d in range(len(order))]

        def put(old: Tensor, t: Tensor) -> Tensor:
            run = (_run(old, known) if old.dim() == len(order) else old).clone(memory_format=torch.contiguous_format)
            run.as_strided(new.size, new.stride, new.offset - known.offset).copy_(t)
            return run.view(lengths).permute(back)

        return put
    index = _index(known, new)

    def put_at(old: Tensor, t: Tensor) -> Tensor:
        run = old.reshape(-1).clone()
        run[index.to(t.device)] = t.to(run.dtype)
        return run.view(known.size)

    return put_at


def _order(place: Place) -> list[int]:
    """All dimensions, from the outermost in memory to the innermost."""
    order = place.order()
    return [d for d in range(len(place.size)) if d not in order] + order


def _run(t: Tensor, place: Place) -> Tensor:
    """The elements in the order of the recorded memory, as a contiguous row that starts its storage."""
    run = t.permute(_order(place)).reshape(-1)
    return (
        run if run.is_contiguous() and run.storage_offset() == 0 else run.clone(memory_format=torch.contiguous_format)
    )


def _sliced(whole: Place, part: Place) -> View | None:
    """Slices of single dimensions, another order, added and repeated dimensions: what most views are."""
    if part.numel == 0 or whole.numel == 0:
        return None
    order = whole.order()
    taken: dict[int, int] = {}  # dimension of whole -> of part
    for d, (n, step) in enumerate(zip(part.size, part.stride, strict=True)):
        if n == 1 or step == 0:
            continue
        e = next((e for e in order if whole.stride[e] <= step), None)
        if e is None or e in taken or step % whole.stride[e]:
            return None
        taken[e] = d
    rest, cut = part.offset - whole.offset, {}
    if rest < 0:
        return None
    for e in order:
        start, rest = divmod(rest, whole.stride[e])
        if e not in taken:
            if start >= whole.size[e]:
                return None
            cut[e] = (start, 0, 0)
            continue
        d = taken[e]
        jump = part.stride[d] // whole.stride[e]
        end = start + (part.size[d] - 1) * jump + 1
        if end > whole.size[e]:
            return None
        cut[e] = (start, end, jump)
    if rest:
        return None
    at = tuple(0 if e not in cut else cut[e][0] if cut[e][2] == 0 else slice(*cut[e]) for e in range(len(whole.size)))
    left = [taken[e] for e in range(len(whole.size)) if e in taken]
    plain = all(isinstance(a, slice) and a == slice(0, n, 1) for a, n in zip(at, whole.size, strict=True))
    ones, arranged = _arranged(left, part)
    shown = (None,) * ones + at
    return arranged if plain and not ones else lambda t: arranged(t[shown])


def _split(whole: Place, part: Place) -> View | None:
    """Dimensions of one row of memory, split and merged: what reshapes of other orders are."""
    if part.numel == 0 or whole.numel == 0:
        return None
    offset = part.offset - whole.offset
    spans = {(s, s * n): d for d, (n, s) in enumerate(zip(part.size, part.stride, strict=True)) if n > 1 and s > 0}
    marks = sorted({1, whole.numel, *(m for span in spans for m in span)}, reverse=True)
    cuts = [(low, high) for high, low in zip(marks, marks[1:], strict=False)]
    wanted = sum(n > 1 and s > 0 for n, s in zip(part.size, part.stride, strict=True))
    if not 0 <= offset < whole.numel or marks[0] != whole.numel or len(spans) != wanted:
        return None
    if any(high % low for low, high in cuts) or any(span not in cuts for span in spans):
        return None
    starts = [offset // low % (high // low) for low, high in cuts]
    if any(start for start, cut in zip(starts, cuts, strict=True) if cut in spans):
        return None
    lengths = [high // low for low, high in cuts]
    at = tuple(slice(None) if cut in spans else start for start, cut in zip(starts, cuts, strict=True))
    ones, arranged = _arranged([spans[cut] for cut in cuts if cut in spans], part)
    lengths, at = [1] * ones + lengths, (slice(None),) * ones + at
    return lambda t: arranged(_run(t, whole).view(lengths)[at])


def _arranged(left: list[int], part: Place) -> tuple[int, View]:
    """How many dimensions of size 1 to put in front of ``left``, dimensions of part, and from there to all in their
    order."""
    # In front they get the strides of a batch; with others torch's batch normalisation has false gradients.
    new = [d for d in range(len(part.size)) if d not in left]
    have = new + left
    permutation = sorted(range(len(have)), key=lambda i: have[i])
    ordered = permutation == list(range(len(have)))
    wide = any(n > 1 and s == 0 for n, s in zip(part.size, part.stride, strict=True))
    size = part.size

    def look(t: Tensor) -> Tensor:
        t = t if ordered else t.permute(permutation)
        return t.expand(size) if wide else t

    return len(new), look


def _index(whole: Place, part: Place) -> Tensor:
    """For every element of ``part`` its number in ``whole``, counted in row-major order."""
    there, at = whole.positions().flatten().sort()
    wanted = part.positions()
    found = torch.searchsorted(there, wanted.clamp_max(int(there[-1]))) if len(there) else wanted
    if wanted.numel() and (not len(there) or not torch.equal(there[found], wanted)):
        raise UnreadableModelError("model: reads memory of a tensor that the tensor itself does not show (as_strided)")
    return at[found]
