"""Is the graph the model? Compared on real inputs, by a plain forward through the nodes that shares nothing with the
bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust._places import wave
from fastrobust._record import ModelMismatchError, without_recording
from fastrobust.bounds import graph as G
from fastrobust.bounds.joint import Centred, Differences, Joint
from fastrobust.reference import relaxations


def evaluate(graph: G.Graph, x: Tensor) -> tuple[Tensor, Tensor]:
    """The graph's outputs for x (B, *shape), and the largest sum of sizes of terms on the way of each example, (B,):
    what rounding is relative to."""
    values: list[Tensor] = []
    largest = x.new_zeros(len(x))
    inside = x if graph.entry is None else graph.entry(x)
    for i, node in enumerate(graph.nodes):
        if i and i not in graph.ancestors[graph.output]:
            values.append(x)
            continue
        given = [values[j] for j in node.inputs]
        sums = isinstance(node, (G.Dense, G.Conv, G.ConvTranspose, G.Scale, G.Sum))
        y = inside if isinstance(node, G.Input) else _value(node, given, False)
        size = _value(node, [t.abs() for t in given], True) if sums else y
        values.append(y)
        if y.numel():
            sizes = size.abs().flatten(1)
            largest = torch.maximum(largest, sizes.where(sizes < 0.5 * G.MASKED, 0.0).amax(1))  # masks are no terms
    out = values[graph.output]
    return (out.log_softmax(1) if graph.log_softmax else out), largest


def _value(node: G.Node, given: list[Tensor], absolute: bool) -> Tensor:
    """The node's value; ``absolute``: with the sizes of all its constants, for a bound of its terms."""
    t = given[0]

    def read(get: G.Getter) -> Any:
        v = get()
        return None if v is None else v.to(t).abs() if absolute else v.to(t)

    out: Tensor
    match node:
        case G.Dense():
            return F.linear(t, read(node.get_weight), read(node.get_bias))
        case G.Conv():
            w, b = read(node.get_weight), read(node.get_bias)
            return F.conv2d(t, w, b, node.stride, node.padding, node.dilation, node.groups)
        case G.ConvTranspose():
            w, b = read(node.get_weight), read(node.get_bias)
            more = node.output_padding, node.groups, node.dilation
            return F.conv_transpose2d(t, w, b, node.stride, node.padding, *more)
        case G.Scale():
            f, s = read(node.get_factor), read(node.get_shift)
            out = t if f is None else t * f
            return out if s is None else out + s
        case G.Sum():
            out = torch.zeros_like(t)
            for sign, v in zip(node.signs, given, strict=True):
                out = out + (v if absolute else sign * v)
            return out
        case G.Concat():
            return torch.cat(given, node.dim + 1)
        case G.Reshape():
            return t.reshape(len(t), *node.shape)
        case G.Monotone() | Centred() | Differences():
            return node.function(t)
        case Joint():
            return node.value(given)
        case G.MaxPool():
            return node.pool(t)
    assert isinstance(node, G.Activation)
    return relaxations.value(t, node.activation, node.params)


def _room(t: Tensor, largest: Tensor) -> Tensor:
    """What rounding explains where sums of terms up to ``largest`` were taken."""
    return 512 * (2.0**-23 if t.dtype == torch.float32 else 2.0**-52) * largest


def check_graph(model: Any, graph: G.Graph, x: Tensor, every: bool = False, other: G.Graph | None = None) -> None:
    """Raises ModelMismatchError where the graph's outputs are not the model's: on x's first two examples and on points
    around and far from them (``every``: on all of x), in one batch, so that a model that mixes the examples of a batch
    is seen, too. other: the same graph in another form, whose outputs are compared with those of ``graph``."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        points = _points(x, every)
        got, largest = evaluate(graph, points)
        compare(_outputs(model, points), got, largest)
        if other is not None:
            there, own = evaluate(other, points)
            compare(got, there, torch.maximum(own, largest))


def _points(x: Tensor, every: bool) -> Tensor:
    """What is compared on: x's first two examples and points around and far from them, or all of x."""
    base = (x if every else x[:2]).detach()
    if not len(base):
        base = x.new_zeros(1, *x.shape[1:])
    across = wave(base[:1])  # points on both sides of kinks
    size = base.abs().amax() + 1e-3
    if every:
        return torch.cat([base, base[:1] + size * across])
    return torch.cat([base, base + 0.1 * size * across, -base, 4 * size * across])


def _outputs(model: Any, points: Tensor) -> Any:
    """Of all points as a batch; one by one from a model with a batch of one written out (exported networks)."""
    with without_recording(points):
        try:
            return model(points.clone())  # a copy: the model may write into what it gets
        except (RuntimeError, ValueError, AssertionError, IndexError):
            return torch.cat([model(p.clone()) for p in points.split(1)])


def compare(want: Any, got: Tensor, largest: Tensor, name: str = "model") -> None:
    """Raises ModelMismatchError where ``want``, the model's outputs, are not ``got`` (B, ...), up to rounding of terms
    up to ``largest`` (B,). Examples whose outputs are not finite are left to the bounds, which say so."""
    if not isinstance(want, Tensor):
        raise ModelMismatchError(f"{name}: returned {type(want).__name__} for a batch, and one tensor for one example")
    n = len(got)
    if want.numel() != got.numel() or want.dim() == 0 or len(want) != n:
        raise ModelMismatchError(
            f"{name}: returns shape {tuple(want.shape)} for {n} examples and {tuple(got.shape[1:])} for each alone; "
            "it mixes the examples of a batch"
        )
    if not got.numel():
        return
    far = (want.reshape(got.shape).to(got.dtype) - got).abs().flatten(1).amax(1)
    room = _room(got, largest)
    bad = torch.isfinite(far) & torch.isfinite(room) & (far > room)
    if bad.any():
        worst = int((far / room).where(bad, 0).argmax())
        raise ModelMismatchError(
            f"{name}: its outputs differ by {float(far[worst]):.3g} from what was read of it (rounding explains "
            f"{float(room[worst]):.1g}), so no bound is returned; does it mix the examples of a batch, leave torch "
            "(numpy), or change between calls?"
        )


def check_contained(
    model: Any, x: Tensor, z: Tensor | None, rows: tuple[Any, Tensor | None], ends: tuple[Any, Any],
    read: Callable[[], G.Graph],
) -> None:  # fmt: skip
    """Raises ModelMismatchError where the model's outputs for the examples x, which the input set holds, lie outside
    the bounds by more than rounding explains. z: those outputs, where they are known. rows: labels or spec of x; ends:
    (lower, upper) of x. read: reads the model anew, and compares, before anything is said of the bounds."""
    spec = rows[1]
    labels = None if rows[0] is None else torch.as_tensor(rows[0])  # of numpy, too
    low, up = ends
    with torch.no_grad():
        x = x.detach()
        z = (_outputs(model, x) if z is None else z.detach()).reshape(len(x), -1)
        if labels is not None and len(x) == 1:  # a few numbers: torch's calls would cost more than the comparison
            (z_all,), label = z.tolist(), int(labels)
            margins = [z_all[label] - v for j, v in enumerate(z_all) if j != label]
            below, above = (None if t is None else t.flatten().tolist() for t in (low, up))
            worst = max(
                max((b - m for b, m in zip(below, margins, strict=True)), default=0.0) if below is not None else 0.0,
                max((m - a for a, m in zip(above, margins, strict=True)), default=0.0) if above is not None else 0.0,
            )
            size = max(map(abs, z_all))
        else:
            if labels is not None:
                own = labels.view(-1, 1).to(z.device, torch.int64)
                others = torch.arange(z.shape[1], device=z.device) != own
                z = (z.gather(1, own) - z)[others].view(len(x), -1)
            elif spec is not None:
                z = (spec.detach().to(z) @ z.unsqueeze(-1)).squeeze(-1)
            gaps = [
                t
                for t in (
                    None if low is None else low.detach().reshape(z.shape) - z,
                    None if up is None else z - up.detach().reshape(z.shape),
                )
                if t is not None and t.numel()
            ]
            worst = max((float(t.amax()) for t in gaps), default=0.0)
            size = float(z.abs().amax()) if z.numel() else 0.0
        if not worst > 1e-6 * size:
            return
        largest = evaluate(read(), x)[1]
        room = float(_room(x, largest).amax())
        if worst > room:
            raise ModelMismatchError(
                f"model: its own output lies {worst:.3g} outside the bounds (rounding explains {room:.1g}), so they "
                f"are not returned; "
                "does forward change from call to call?"
            )
