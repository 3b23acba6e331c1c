"""Interval bounds of a plain chain of layers where nothing is recorded: the kernels in a row, without the engine around them.

The engine's bookkeeping costs as much as the products of a small batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.ops import bounds as ops

Step = tuple[G.Node, int]  # a layer and what its product returns (``ops.CENTER``, ``ops.RELU``)


def chain_of(graph: G.Graph) -> list[Step] | None:
    """The layers before the last one, where all are Linear, Conv2d, Flatten or a ReLU after a product, one after the other."""
    if graph.chain is False:
        graph.chain = _find(graph)
    return graph.chain


def _find(graph: G.Graph) -> list[Step] | None:
    nodes = graph.nodes
    if graph.output != len(nodes) - 1 or any(n.inputs != (i,) for i, n in enumerate(nodes[1:])):
        return None
    if not isinstance(nodes[-1], G.Dense) or len(nodes[-1].shape) != 1:
        return None
    steps: list[Step] = []
    for node in nodes[1:-1]:
        if isinstance(node, G.Activation):
            if node.activation != "relu" or not steps or not isinstance(steps[-1][0], (G.Dense, G.Conv)):
                return None
            if steps[-1][1] != ops.RELU:
                steps[-1] = (steps[-1][0], ops.RELU)
        elif (
            isinstance(node, (G.Dense, G.Reshape))
            and len(node.shape) == 1
            or isinstance(node, G.Conv)
            and node.groups == 1
            and node.dilation == (1, 1)
        ):
            steps.append((node, ops.CENTER))
        else:
            return None
    products = [finish for node, finish in steps if not isinstance(node, G.Reshape)]
    # the engine merges linear layers at the end, which is tighter than an interval between them
    return steps if not products or products[-1] == ops.RELU else None


def margins_of_chain(
    graph: G.Graph, x: Tensor, eps: Any, clip: tuple[float, float] | None, plus: Tensor, minus: Tensor, example: Tensor, sides: int
) -> Tensor | None:  # fmt: skip
    """Bounds (sides, R) of the differences ``plus`` - ``minus`` of outputs over an l-infinity ball; None where this is not the
    way. x (B, *shape), B > 0."""
    steps = chain_of(graph)
    if steps is None or x.dtype != torch.float32 or not x.is_cpu or not x.shape[0]:
        return None
    last: Any = graph.nodes[graph.output]
    parameters = [
        t for n, _ in (*steps, (last, 0)) if not isinstance(n, G.Reshape) for t in (n.get_weight(), n.get_bias())
    ]  # type: ignore[attr-defined]
    if not ops.direct(x, eps if isinstance(eps, Tensor) else None, *parameters):
        return None
    if clip is None and not isinstance(eps, Tensor):
        c, r = x, x.new_full((1, *x.shape[1:]), eps)
    else:
        c, r = ops.box_center(x, eps, clip)
    at = 0
    for node, finish in steps:
        if isinstance(node, G.Reshape):
            c, r = c.reshape(-1, node.shape[0]), r.reshape(-1, node.shape[0])
            continue
        w, b = parameters[at], parameters[at + 1]
        at += 2
        if isinstance(node, G.Conv):
            c, r = ops.center_conv2d(c, r, w, b, node.stride, node.padding, 1, 1, finish)
        else:
            c, r = ops.center_linear(c, r, w, b, finish)
    w, b = parameters[-2:]
    offset = c.new_zeros(len(plus)) if b is None else b[plus] - b[minus]
    if r.shape[0] != c.shape[0]:
        r = r.expand_as(c)
    return ops.concretize_rows(w[None], offset.expand(sides, -1), example, (c, r), None, 1.0, plus, minus=minus)
