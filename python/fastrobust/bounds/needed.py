"""Which intervals matter: the neurons of a layer that some line is made from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.joint import Differences, Joint
from fastrobust.ops import bounds as ops


@torch.no_grad()
def needed(graph: G.Graph, i: int, l: Tensor, u: Tensor) -> Tensor:
    """Where (B, *shape) tighter bounds [l, u] of node ``i`` could change the lines of a nonlinear node that reads it,
    straight or through other nonlinear nodes. What comes behind a linear node is bounded at that one."""
    mask = torch.zeros_like(l, dtype=torch.bool)
    for c in graph.nodes[i].consumers:
        node = graph.nodes[c]
        if c not in graph.ancestors[graph.output]:
            continue
        if isinstance(node, G.Activation):
            mask |= node.unstable(l, u)
            if _read_by_nonlinear(graph, c):  # a max pooling reads what a ReLU lets pass
                low, up = ops.interval_activation(l, u, node.activation, node.params)
                mask |= (low < up) & needed(graph, c, low, up)
        elif isinstance(node, (Joint, Differences)):
            mask |= l < u
        elif isinstance(node, G.MaxPool):
            low, up = node.interval([(l, u)])
            contested = ops.relax_max_pool(l, u, node.window).intercepts[1] > 0
            if all(_is_relu(graph.nodes[k]) for k in node.consumers):
                contested &= up > 0
            level = torch.where(contested | needed(graph, c, low, up), low, math.inf)
            mask |= ops.above_level(u, level, node.window)
    return mask


def _read_by_nonlinear(graph: G.Graph, i: int) -> bool:
    return any(isinstance(graph.nodes[c], (G.Activation, G.MaxPool, Joint)) for c in graph.nodes[i].consumers)


def _is_relu(node: G.Node) -> bool:
    return isinstance(node, G.Activation) and node.activation == "relu"
