"""Interval bounds of a plain chain of layers where nothing is recorded: small batches in one call of the compiled
module.

Bookkeeping costs as much as the products of a small batch.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from fastrobust import _C
from fastrobust.bounds import graph as G
from fastrobust.bounds.checks import check_clip, check_labels
from fastrobust.bounds.decisions import allowed, declined, took
from fastrobust.bounds.trace import plain_graph
from fastrobust.ops import bounds as ops

Step = tuple[G.Node, int]  # a layer and what its product returns (``ops.CENTER``, ``ops.RELU``)
_WIDE = _C.cpu_variant() == "v4"  # our products are as fast as the vendor's there
SMALL_BATCH = 128
_MOST_WORK = 1 << 22  # numbers that a larger batch may use


class Chain:
    """The layers before the last one, and what the kernel of small batches is told of them."""

    def __init__(self, graph: G.Graph, steps: list[Step]):
        self.steps, self.last = steps, cast(G.Dense, graph.nodes[graph.output])
        self.told = [_told(graph, *step) for step in steps]
        # Examples up to which the kernel of small batches is the faster way. Convolutions read centre and radius at
        # once there, which no two calls of the vendor's make up for.
        one_call = _WIDE or any(isinstance(node, G.Conv) for node, _ in steps)
        self.most = SMALL_BATCH if one_call else 32
        self.work: dict[int, int] = {}  # numbers that the kernel needs, by batch size
        self.layers: list[Any] = [None if isinstance(n, G.Reshape) else n for n, _ in steps] + [self.last]

    def parameters(self) -> list[Tensor | None]:
        """Weight and bias of every layer, the last one's at the end."""
        found: list[Tensor | None] = []
        for layer in self.layers:
            found += (None, None) if layer is None else (layer.get_weight(), layer.get_bias())
        return found


def _told(graph: G.Graph, node: G.Node, finish: int) -> tuple[int, ...]:
    shape = graph.input_shapes(node)[0]
    if isinstance(node, G.Dense):
        return (1, finish, shape[0], node.shape[0], *[0] * 12)
    c, h, w = shape if len(shape) == 3 else (1, 1, node.size)
    if isinstance(node, G.Reshape):
        return (0, 0, 0, 0, h, w, c, *[0] * 9)
    assert isinstance(node, G.Conv)
    o, oh, ow = node.shape
    return (2, finish, 0, 0, h, w, c, oh, ow, o, *node.get_weight().shape[2:], *node.stride, *node.padding)


def chain_of(graph: G.Graph) -> Chain | None:
    """The chain, where all layers are Linear, Conv2d, Flatten or a ReLU after a product, one after the other."""
    if graph.chain is False:
        steps = _find(graph)
        graph.chain = None if steps is None else Chain(graph, steps)
    return cast("Chain | None", graph.chain)


def small_margins(
    model: Any, x: Any, eps: Any, clip: Any, labels: Any, sides: int, graph: G.Graph | None = None
) -> Tensor | None:
    """Interval bounds (sides, B, K - 1) of the margins over an l-infinity ball, in one call; None where arguments,
    model or results want the longer way, which then also says what is wrong with them. graph: the model's, where it has
    been read."""
    if not allowed("one call"):
        return None
    if type(x) is not Tensor or type(eps) is not float or not 0.0 <= eps < math.inf:
        return None
    batch = len(x) if x.dim() > 1 else 0
    if not 0 < batch <= SMALL_BATCH or x.dtype != torch.float32 or not x.is_cpu or not x.is_contiguous():
        return declined("one call", f"it takes 1 to {SMALL_BATCH} examples in float32 on the CPU without gaps")
    if type(labels) is not Tensor or labels.dtype != torch.int64:  # other kinds of integers: the same bits
        try:
            labels = check_labels(labels, batch, x.device).contiguous()
        except (TypeError, ValueError):
            return None
    if labels.shape != (batch,) or not labels.is_cpu or not labels.is_contiguous():
        return None
    low, high = check_clip(clip, x) if clip is not None else (-math.inf, math.inf)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return None
    graph = plain_graph(model, x) if graph is None else graph
    chain = None if graph is None else chain_of(graph)
    if graph is None or chain is None or batch > chain.most or not graph.nodes[0].size or chain.last.shape[0] < 2:
        return declined("one call", "the model is not a chain of torch's own layers, or the batch too large for it")
    if graph.entry is not None:
        return declined("one call", "the model first gives its input another shape")
    parameters = chain.parameters()
    if not ops.direct(x, *parameters):
        return declined("one call", "something is recorded for gradients")
    addresses = []
    for p in parameters:
        if p is None:
            addresses.append(0)
        elif p.dtype == torch.float32 and p.is_cpu and p.is_contiguous():
            addresses.append(p.data_ptr())
        else:
            return None
    classes = chain.last.shape[0]
    sizes = (batch, x.numel() // batch, eps, low, high)
    if batch not in chain.work:
        chain.work[batch] = _C.bounds_interval_chain(
            chain.told, addresses, x.data_ptr(), *sizes, 0, classes, 0, 0, sides
        )
    if batch > 16 and chain.work[batch] > _MOST_WORK:
        return None
    work = torch.empty(chain.work[batch], dtype=torch.float32)
    out = torch.empty(sides, batch, classes - 1, dtype=torch.float32)
    refused = _C.bounds_interval_chain(
        chain.told, addresses, x.data_ptr(), *sizes, labels.data_ptr(), classes, work.data_ptr(), out.data_ptr(), sides
    )
    if refused:
        return declined("one call", "labels or bounds are not what they should be; the longer way says how")
    took("one call")
    return out


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
