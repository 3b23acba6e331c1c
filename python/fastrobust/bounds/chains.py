"""Chains of layers that one kernel takes from an activation down to the input."""

from __future__ import annotations

from typing import Any, cast

from fastrobust.bounds import graph as G
from fastrobust.ops import bounds as ops

Image = tuple[int, int, int]


def live_chain(graph: G.Graph, start: int, apart: bool = False) -> list[tuple[G.Activation, Any, Image]]:
    """The activations, the dense layers or convolutions before them and the images before those (a vector has one
    position), one after the other, from the activation ``start`` to the input; empty where anything else comes between.
    apart: convolutions with groups or dilation, too."""
    found: list[tuple[G.Activation, Any, Image]] = []
    act = graph.nodes[start]
    while isinstance(act, G.Activation):
        layer = graph.nodes[act.inputs[0]]
        if layer.consumers != [act.index] or not isinstance(layer, (G.Conv, G.Dense)):
            return []
        before = graph.nodes[layer.inputs[0]]
        if isinstance(layer, G.Conv):
            if not apart and (layer.groups != 1 or layer.dilation != (1, 1)):
                return []
        elif len(layer.shape) != 1:
            return []
        elif isinstance(before, G.Reshape):
            if before.consumers != [layer.index]:
                return []
            before = graph.nodes[before.inputs[0]]
        shape = before.shape
        if len(shape) not in (1, 3):
            return []
        found.append((act, layer, (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)))
        act = before
    return found if isinstance(act, G.Input) else []


def conv_chain(graph: G.Graph, start: int) -> list[tuple[G.Activation, G.Conv]]:
    """``live_chain`` where all of its layers are convolutions that the kernel of ``ops.spread`` takes; else empty."""
    found = [(act, layer) for act, layer, _ in live_chain(graph, start, True)]
    fit = all(isinstance(c, G.Conv) and ops.spread_lanes(c.get_weight(), 2 * c.shape[2]) for _, c in found)
    return found if fit else []


def live_steps(graph: G.Graph, start: int, lines: dict[int, Any]) -> list[ops.LiveStep]:
    """``live_chain`` with its lines and weights, for ``ops.concretize_live``; empty where something is recorded or has
    no such form."""
    steps: list[ops.LiveStep] = []
    for act, layer, image in live_chain(graph, start):
        line = lines.get(act.index)
        if line is None or line.source is not None or (layer.bias() is not None and layer.index not in line.folded):
            return []
        slopes, intercepts = line.flattened(len(act.shape) == 3)
        w = layer.get_weight()
        if not ops.direct(w, slopes, intercepts):
            return []
        if isinstance(layer, G.Conv):
            steps.append(
                ops.LiveStep(slopes, intercepts, cast(Image, act.shape), w, layer.stride, layer.padding, image)
            )
        else:
            shape = (act.shape[0], 1, 1)
            steps.append(ops.LiveStep(slopes, intercepts, shape, w.unflatten(1, image), (1, 1), (0, 0), image))
    return steps
