"""The multiplications that rows of linear bounds need: those between neurons whose lines are not zero, in each row's
windows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import ways
from fastrobust.ops import bounds as ops


def row_flops(call: Callable[[], object]) -> int:
    """Two operations for each multiplication in the rows that ``call`` takes through convolutions, for either side
    where the two have lines of their own. Products of dense layers are not counted."""
    total = [0.0]

    def counting(name: str, count: Callable[..., float]) -> Any:
        run = getattr(ops, name)

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            total[0] += 2 * count(*args)
            out: Tensor = run(*args, **kwargs)
            return out

        return mock.patch.object(ops, name, counted)

    counts: dict[str, Callable[..., float]] = {
        "concretize_graph": _of_graph,
        "concretize_live": _of_chain,
        "concretize_through": _of_chain,
    }
    with contextlib.ExitStack() as stack:
        for name, count in counts.items():
            stack.enter_context(counting(name, count))
        stack.enter_context(ways(without="graph op"))  # the engine tells of every product
        call()
    return int(total[0])


def _living(slopes: Tensor | None, intercepts: Tensor | None, shape: tuple[int, ...], examples: int) -> Tensor:
    """Neurons with lines at each position: (B, 1, height, width)."""
    c, h, w = shape
    if slopes is None or intercepts is None:
        return torch.full((examples, 1, h, w), float(c), dtype=torch.float64)
    alive = (slopes != 0).any(0) | (intercepts != 0).any(0)
    return alive.view(-1, h, w, c).sum(3, dtype=torch.float64).unsqueeze(1).expand(examples, -1, -1, -1)


def _pairs(source: Tensor, to: Tensor, conv: Any) -> Tensor:
    """Products between the neurons at each position of a convolution's result and those that it reads: (B, height,
    width).

    With groups as many as if the neurons were spread evenly over them. Steps of living chains have neither groups nor
    dilation.
    """
    dilation, groups = getattr(conv, "dilation", (1, 1)), getattr(conv, "groups", 1)
    met = F.conv2d(
        to, torch.ones(1, 1, *conv.weight.shape[2:], dtype=to.dtype), None, conv.stride, conv.padding, dilation
    )
    return (source * met).squeeze(1) / groups


def _apart(b: Tensor, matrices: int, slopes: list[Tensor]) -> int:
    return 2 if len(b) == 2 and (matrices == 2 or any(len(s) == 2 for s in slopes)) else 1


def _of_chain(A: Tensor, b: Tensor, example: Tensor, steps: list[Any], *rest: Any) -> float:
    """Whole maps; windows of single neurons are counted by the kernel of graphs, which takes them."""
    examples = steps[0].slopes.shape[1]
    live = [_living(s.slopes, s.intercepts, s.shape, examples) for s in steps]
    live.append(_living(None, None, steps[-1].shape_in, examples))
    per = sum(_pairs(a, c, s).sum((1, 2)) for s, a, c in zip(steps, live, live[1:], strict=False))
    assert isinstance(per, Tensor)
    return float(per[example].sum()) * _apart(b, len(A), [s.slopes for s in steps])


def _of_graph(
    b: Tensor, example: Tensor, examples: int, stages: list[Any], box: Any, ball: Any, q: float, unit: Any = None
) -> float:
    live = [_living(s.slopes, s.intercepts, s.shape, examples) for s in stages]
    count = b.shape[1]
    whole = unit is None
    if not whole:
        neuron, (_, h, w) = unit
        at = neuron % (h * w)
        start = torch.stack([at // w, at // w + 1, at % w, at % w + 1])
    rects: list[Tensor] = []  # of each stage: top, bottom, left, right of each row
    total = 0.0
    for stage, own in zip(stages, live, strict=True):
        _, height, width = stage.shape
        found = [torch.tensor([0, height, 0, width])[:, None].expand(4, count)] if stage.rows is not None else []
        for link in stage.links:
            r = start if link.source < 0 else rects[link.source]
            if link.weight is None and link.follows is None:
                found.append(r)
                continue
            if link.source >= 0 and link.weight is not None:
                total += _inside(_pairs(live[link.source], own, link), r, example)
            kernel = link.kernel if link.weight is None else link.weight.shape[2:]
            kh, kw = (d * (k - 1) + 1 for d, k in zip(link.dilation, kernel, strict=True))
            (sy, sx), (py, px) = link.stride, link.padding
            found.append(torch.stack([
                (r[0] * sy - py).clamp(min=0), ((r[1] - 1) * sy - py + kh).clamp(max=height),
                (r[2] * sx - px).clamp(min=0), ((r[3] - 1) * sx - px + kw).clamp(max=width),
            ]))  # fmt: skip
        joined = torch.stack(found)
        rects.append(
            torch.stack([joined[:, 0].amin(0), joined[:, 1].amax(0), joined[:, 2].amin(0), joined[:, 3].amax(0)])
        )
    matrices = max((len(s.rows[0]) for s in stages if s.rows is not None), default=1)
    return total * _apart(b, matrices, [s.slopes for s in stages if s.slopes is not None])


def _inside(numbers: Tensor, rects: Tensor, example: Tensor) -> float:
    """The sum over rows of the numbers (B, height, width) in their rectangles."""
    sums = F.pad(numbers, (1, 0, 1, 0)).cumsum(1).cumsum(2)
    top, bottom, left, right = rects
    ends = (
        sums[example, bottom, right]
        - sums[example, top, right]
        - sums[example, bottom, left]
        + sums[example, top, left]
    )
    return float(ends.sum())
