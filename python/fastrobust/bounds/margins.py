"""Linear bounds with lines from intervals of plain ReLU networks over boxes: one op in place of the engine's walk."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.chains import live_chain
from fastrobust.bounds.decisions import allowed, declined, took
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds.margins import Layer, Rows, relu_margins

_LARGE = 1 << 21  # numbers of a weight
_KINDS = {"crown-ibp": True, "ibp-linear": False}  # whether the lines are adaptive


class Plan:
    """The layers from the input on, each with its node, and the last one."""

    def __init__(self, layers: list[Layer], nodes: list[Any], last: G.Dense):
        self.layers, self.nodes, self.last = layers, nodes, last
        self.widest = max(n for layer in layers for n in (math.prod(layer.shape_in), math.prod(layer.shape)))


def plan_of(graph: G.Graph) -> Plan | None:
    """The plan, where dense layers follow convolutions (or there are none of either), a ReLU each, then a dense
    layer."""
    if graph.plan is False:
        graph.plan = _find(graph)
    found: Plan | None = graph.plan
    return found


def _find(graph: G.Graph) -> Plan | None:
    last = graph.nodes[graph.output]
    if not isinstance(last, G.Dense) or len(last.shape) != 1:
        return None
    before = graph.nodes[last.inputs[0]]
    if isinstance(before, G.Reshape):
        before = graph.nodes[before.inputs[0]]
        if len(before.shape) not in (1, 3):
            return None
    layers, nodes = [], []
    for act, node, image in reversed(live_chain(graph, before.index)):
        if act.activation != "relu":
            return None
        if isinstance(node, G.Dense):
            layers.append(Layer(True, image, (node.shape[0], 1, 1), (1, 1), (0, 0)))
        else:
            c, h, w = node.shape
            if not ops.spread_lanes(node.get_weight(), w):
                return None
            layers.append(Layer(False, image, (c, h, w), node.stride, node.padding))
        nodes.append(node)
    if (
        not layers
        or not graph.nodes[0].size
        or any(a.dense > b.dense for a, b in zip(layers, layers[1:], strict=False))
    ):
        return None
    return Plan(layers, nodes, last)


def margins_of_plan(
    graph: G.Graph, x: Tensor, eps: Any, clip: ops.Clip, method: str, rows: Rows, max_memory: int
) -> Tensor | None:
    """Bounds (sides, R) over an l-infinity ball (and ``clip``); None where this is not the way. x (B, *shape)."""
    way = "chain op"
    if not allowed(way):
        return None
    if method not in _KINDS or not x.is_cpu or not ops.native(x) or not x.shape[0]:
        return declined(way, f"it takes {' and '.join(_KINDS)} in float32 on the CPU")
    plan = plan_of(graph)
    count = len(rows.plus)
    if plan is None:
        return declined(way, "the graph is no chain of convolutions, then dense layers, with a ReLU each")
    if 4 * 4 * plan.widest * count * rows.sides > max_memory:
        return declined(way, "the rows of the widest layer exceed max_memory")
    nodes = [*plan.nodes, plan.last]
    weights, biases = [n.get_weight() for n in nodes], [n.get_bias() for n in nodes]
    if not ops.direct() or any(t is not None and (not t.is_cpu or not ops.native(t)) for t in (*weights, *biases)):
        return declined(
            way,
            "something records gradients through forward mode or a subclass, or parameters are not float32 on the CPU",
        )
    if any(s.dense and _moves_too_much(s, w, count * rows.sides) for s, w in zip(plan.layers, weights, strict=False)):
        return declined(way, "reordering the weight behind the image would cost more than the rows")
    took(way)
    c, r = ops.box_center(x, eps.to(x.dtype) if isinstance(eps, Tensor) else eps, clip)
    c, r = flat(c, plan.layers[0].shape_in), flat(r, plan.layers[0].shape_in)
    shared = clip is None and not isinstance(eps, Tensor) and not ops.needs_grad(c, r)
    return relu_margins(plan.layers, weights, biases, c, r, shared, rows, _KINDS[method])


def _moves_too_much(layer: Layer, weight: Tensor, rows: int) -> bool:
    """Whether bringing the weight behind an image into channels-last order moves more than bringing the rows into the
    weight's."""
    image = layer.shape_in[0] > 1 and layer.shape_in[1] * layer.shape_in[2] > 1
    return image and weight.numel() >= _LARGE and 2 * rows < weight.shape[0]


def flat(t: Tensor, image: tuple[int, int, int]) -> Tensor:
    """(B, *shape) as (B, n), channels innermost."""
    if image[0] > 1 and image[1] * image[2] > 1:
        t = t.reshape(-1, *image).movedim(1, -1)
    return t.reshape(len(t), -1).contiguous()
