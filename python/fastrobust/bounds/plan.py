"""The normal form of a graph: the same function in few kinds of nodes, so that every fast way serves every network.

Factors and shifts join the layers beside them, values that are only moved join the weights that read them, average
pooling is a convolution of every channel, and a layer behind a concatenation is a sum of layers of its parts. What
joins is computed from the parameters as they are at each call, once a call, and autograd records it. Bounds stay the
same up to rounding, or get tighter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

from fastrobust.bounds import folds
from fastrobust.bounds import graph as G
from fastrobust.bounds.form import FEW_PARTS, MOST_PARTS, Form, bijective, copy

_FORM: ContextVar[str] = ContextVar("fastrobust_form", default="normal")
MOST_NUMBERS = 1 << 18  # of a weight that grows with what joins it
LARGE = 1 << 21  # numbers of a dense weight whose copy would cost more than a pass over what it makes


@contextmanager
def as_lowered() -> Iterator[None]:
    """Within, graphs stay as the model computes: for comparisons."""
    token = _FORM.set("lowered")
    try:
        yield
    finally:
        _FORM.reset(token)


def form() -> str:
    """ "normal", or "lowered" within ``as_lowered``."""
    return _FORM.get()


def normal_form(graph: G.Graph) -> G.Graph:
    """The graph's function in normal form; ``graph`` itself is not changed."""
    return _Rules(graph).run()


class _Rules(Form):
    """Rules, each of which gives one node another form; they say whether they did."""

    # -- the work ------------------------------------------------------------------------------------------------------
    def run(self) -> G.Graph:
        rules: list[tuple[type, list[Callable[[int, Any], bool]]]] = [
            (G.Reshape, [self.reshape]),
            (G.Scale, [self.idle_scale, self.scales, self.scale_behind, self.scale_below_reshape, self.above_concat]),
            (G.Sum, [self.sums, self.sum_of_reshapes, self.sum_of_moves]),
            (G.Concat, [self.concats]),
            (G.Activation, [self.twice, self.activation_above_reshape, self.activation_above_moves, self.above_concat]),
            (G.MaxPool, [self.above_concat]),
            (G.Monotone, [self.moved_twice, self.pooling]),
            (G.ConvTranspose, [self.turned]),
            (G.Conv, [self.padded, self.scale_ahead, self.layer_of_parts, self.above_concat]),
            (G.Dense, [self.scale_ahead, self.moved, self.layer_of_parts, self.tokens]),
        ]
        self.enter()
        steps = 0
        while self.left and steps < 200 * len(self.graph.nodes) + 1000:
            i = self.left.pop()
            self.queued.discard(i)
            node = self.nodes[i]
            if not self.alive(i) or i in self.same:
                continue
            for kind, tries in rules:
                if isinstance(node, kind) and any(rule(i, node) for rule in tries):
                    steps += 1
                    break
            if not self.left:
                self.enter()
        return self.made()

    # -- shapes --------------------------------------------------------------------------------------------------------
    def reshape(self, i: int, node: G.Reshape) -> bool:
        j = node.inputs[0]
        before = self.nodes[j]
        if before.shape == node.shape:
            return self.bypass(i, j)
        if isinstance(before, G.Reshape):
            return self.put(i, G.Reshape(before.inputs, node.shape, node.where))
        if isinstance(before, G.Concat) and before.dim == 0 and len(node.shape) == 1 and self.alone(j):
            if not self._takes_apart(before, i):
                return False
            parts = tuple(self.add(G.Reshape((k,), (self.nodes[k].size,), node.where), i) for k in before.inputs)
            return self.put(i, G.Concat(parts, node.shape, node.where, dim=0))
        return False

    def activation_above_reshape(self, i: int, node: G.Activation) -> bool:
        before = self.before(node)
        if not isinstance(before, G.Reshape) or not self._moves_above(before, node.shape):
            return False
        inner = self.before(before).shape
        k = self.add(dataclasses.replace(copy(node), inputs=before.inputs, shape=inner), i)
        return self.put(i, G.Reshape((k,), node.shape, node.where))

    def _moves_above(self, reshape: G.Reshape, shape: G.Shape) -> bool:
        """Maps stay maps: values are not taken apart into a vector before a convolution reads them."""
        return len(self.before(reshape).shape) == 3 or len(shape) != 3

    def scale_below_reshape(self, i: int, node: G.Scale) -> bool:
        """A scale behind a reshape moves above it where it has a number, or one for each channel."""
        before = self.before(node)
        if (
            not isinstance(before, G.Reshape)
            or not self._moves_above(before, node.shape)
            or not self.alone(node.inputs[0])
        ):
            return False
        inner = self.before(before).shape
        factor, shift = (folds.reshaped(get, node.shape, inner) for get in (node.get_factor, node.get_shift))
        if factor is None or shift is None:
            return False
        k = self.add(G.Scale(before.inputs, inner, node.where, get_factor=factor, get_shift=shift), i)
        return self.put(i, G.Reshape((k,), node.shape, node.where))

    # -- other orders --------------------------------------------------------------------------------------------------
    def _through_reshapes(self, j: int) -> int:
        while isinstance(self.nodes[j], G.Reshape):
            j = self.nodes[j].inputs[0]
        return j

    def moved_twice(self, i: int, node: G.Monotone) -> bool:
        """One order of another, which may be where the values began."""
        j = self._through_reshapes(node.inputs[0])
        before = self.nodes[j]
        if not isinstance(before, G.Monotone) or not bijective(before, self.before(before)):
            return False
        if not bijective(node, before):
            return False
        places, source = before.places[node.places], before.inputs[0]  # type: ignore[index]
        if torch.equal(places, torch.arange(len(places))):
            return self.put(i, G.Reshape((source,), node.shape, node.where))
        return self.put(i, folds.moves(source, self.nodes[source].shape, places, node.shape, node.where))

    def activation_above_moves(self, i: int, node: G.Activation) -> bool:
        before = self.before(node)
        if not isinstance(before, G.Monotone) or not bijective(before, self.before(before)):
            return False
        source = before.inputs[0]
        inner = self.nodes[source].shape
        if len(inner) != 3 and len(node.shape) == 3:
            return False
        k = self.add(dataclasses.replace(copy(node), inputs=(source,), shape=inner), i)
        return self.put(i, dataclasses.replace(copy(before), inputs=(k,), where=node.where))

    def sum_of_moves(self, i: int, node: G.Sum) -> bool:
        parts: list[Any] = [self.nodes[j] for j in node.inputs]
        if not all(isinstance(p, G.Monotone) and bijective(p, self.before(p)) for p in parts):
            return False
        places, inner = parts[0].places, self.before(parts[0]).shape
        if any(not torch.equal(p.places, places) or self.before(p).shape != inner for p in parts):
            return False
        k = self.add(G.Sum(tuple(p.inputs[0] for p in parts), inner, node.where, signs=node.signs), i)
        return self.put(i, dataclasses.replace(copy(parts[0]), inputs=(k,), where=node.where))

    def tokens(self, i: int, node: G.Dense) -> bool:
        """A dense layer of every token is a convolution of 1 x 1, where the tokens come from maps, or from the
        input."""
        if len(node.shape) not in (2, 3):
            return False
        j = node.inputs[0]
        shape = self.nodes[j].shape
        features, lead = shape[-1], shape[:-1]
        inner = (features, *lead) if len(lead) == 2 else (features, 1, *lead)
        order = torch.arange(math.prod(shape)).view(-1, features).t().flatten()
        back = torch.arange(node.size).view(node.shape[-1], -1).t().flatten()
        before = self.nodes[j]
        if j == 0:
            if not all(isinstance(self.nodes[k], G.Dense) for k in self.readers[0]):
                return False
        else:
            maps = isinstance(before, G.Monotone) and bijective(before, self.before(before))
            maps = maps and len(self.before(before).shape) == 3
            if not maps or not torch.equal(before.places[order], torch.arange(len(order))):
                return False
        a = self.add(folds.moves(j, shape, order, inner, node.where), i)
        get = node.get_weight
        weight = lambda: get().unsqueeze(2).unsqueeze(3)  # noqa: E731
        out = (node.shape[-1], *inner[1:])
        b = self.add(G.Conv((a,), out, node.where, get_weight=weight, get_bias=node.get_bias), i)
        return self.put(i, folds.moves(b, out, back, node.shape, node.where))

    # -- scales --------------------------------------------------------------------------------------------------------
    def idle_scale(self, i: int, node: G.Scale) -> bool:
        return node.get_factor() is None and node.get_shift() is None and self.bypass(i, node.inputs[0])

    def scales(self, i: int, node: G.Scale) -> bool:
        before = self.before(node)
        if not isinstance(before, G.Scale) or not self.alone(node.inputs[0]):
            return False
        factor, shift = folds.composed(before, node)
        return self.put(i, G.Scale(before.inputs, node.shape, node.where, get_factor=factor, get_shift=shift))

    def scale_behind(self, i: int, node: G.Scale) -> bool:
        """A scale joins the layer before it."""
        before = self.before(node)
        if not isinstance(before, (G.Conv, G.Dense, G.ConvTranspose)) or not self.alone(node.inputs[0]):
            return False
        axis = -1 if isinstance(before, G.Dense) else 0
        if self._large(before) and node.get_factor() is not None:
            return False
        if not all(folds.along(get, node.shape, axis) for get in (node.get_factor, node.get_shift)):
            return False
        weight, bias = folds.behind(before, node)
        return self.put(i, dataclasses.replace(_plain(before), where=node.where, get_weight=weight, get_bias=bias))

    @staticmethod
    def _large(layer: Any) -> bool:
        return isinstance(layer, G.Dense) and layer.get_weight().numel() > LARGE

    def scale_ahead(self, i: int, node: Any) -> bool:
        """A scale joins the layer that reads it; its shift does not pass padding, which is zero behind it."""
        scale = self.before(node)
        if not isinstance(scale, G.Scale) or not self.alone(node.inputs[0]):
            return False
        conv = isinstance(node, G.Conv)
        if conv and node.padding != (0, 0) and scale.get_shift() is not None:
            return False
        if not conv and (len(node.shape) != 1 or self._large(node) and scale.get_factor() is not None):
            return False
        if not all(folds.along(get, scale.shape, 0) for get in (scale.get_factor, scale.get_shift)):
            return False
        weight, bias = folds.ahead(scale, node)
        return self.put(i, dataclasses.replace(_plain(node), inputs=scale.inputs, get_weight=weight, get_bias=bias))

    # -- sums and activations ------------------------------------------------------------------------------------------
    def sums(self, i: int, node: G.Sum) -> bool:
        if len(node.inputs) == 1 and node.signs == (1,):
            return self.bypass(i, node.inputs[0])
        inputs: list[int] = []
        signs: list[int] = []
        for j, sign in zip(node.inputs, node.signs, strict=True):
            inner = self.nodes[j]
            if isinstance(inner, G.Sum) and self.alone(j):
                inputs += inner.inputs
                signs += [sign * s for s in inner.signs]
            else:
                inputs.append(j)
                signs.append(sign)
        if len(inputs) == len(node.inputs):
            return False
        return self.put(i, G.Sum(tuple(inputs), node.shape, node.where, signs=tuple(signs)))

    def sum_of_reshapes(self, i: int, node: G.Sum) -> bool:
        parts = [self.nodes[j] for j in node.inputs]
        if not all(isinstance(p, G.Reshape) for p in parts):
            return False
        shapes = {self.before(p).shape for p in parts}
        if len(shapes) != 1:
            return False
        inner = shapes.pop()
        k = self.add(G.Sum(tuple(p.inputs[0] for p in parts), inner, node.where, signs=node.signs), i)
        return self.put(i, G.Reshape((k,), node.shape, node.where))

    def twice(self, i: int, node: G.Activation) -> bool:
        before = self.before(node)
        same = isinstance(before, G.Activation) and node.activation == before.activation == "relu"
        return same and self.bypass(i, node.inputs[0])

    # -- concatenations ------------------------------------------------------------------------------------------------
    def concats(self, i: int, node: G.Concat) -> bool:
        if len(node.inputs) == 1:
            return self.bypass(i, node.inputs[0])
        inputs: list[int] = []
        for j in node.inputs:
            inner = self.nodes[j]
            inputs += inner.inputs if isinstance(inner, G.Concat) and inner.dim == node.dim else (j,)
        if not len(node.inputs) < len(inputs) <= MOST_PARTS:
            return False
        return self.put(i, G.Concat(tuple(inputs), node.shape, node.where, dim=node.dim))

    def _takes_apart(self, concat: G.Concat, reader: int) -> bool:
        parts = len(concat.inputs)
        return parts <= MOST_PARTS and self.layer_below(reader, parts)

    def above_concat(self, i: int, node: Any) -> bool:
        """What treats every channel alone comes before the concatenation."""
        concat = self.before(node)
        if not isinstance(concat, G.Concat) or not self._takes_apart(concat, i):
            return False
        maps = concat.dim == 0 and len(concat.shape) == 3
        shapes = [self.nodes[j].shape for j in concat.inputs]
        sizes = [s[concat.dim] for s in shapes]
        parts: list[G.Node] = []
        if isinstance(node, G.Activation):
            parts = [
                dataclasses.replace(copy(node), inputs=(j,), shape=s)
                for j, s in zip(concat.inputs, shapes, strict=True)
            ]
        elif isinstance(node, G.Scale):
            factors, shifts = (
                folds.parts(get, node.shape, concat.dim, sizes) for get in (node.get_factor, node.get_shift)
            )
            for j, s, f, b in zip(concat.inputs, shapes, factors, shifts, strict=True):
                parts.append(G.Scale((j,), s, node.where, get_factor=f, get_shift=b))
        elif isinstance(node, G.MaxPool) and maps:
            parts = [
                dataclasses.replace(copy(node), inputs=(j,), shape=(n, *node.shape[1:]))
                for j, n in zip(concat.inputs, sizes, strict=True)
            ]
        elif isinstance(node, G.Conv) and maps and node.groups == node.shape[0] == concat.shape[0] and node.groups > 1:
            weights, biases = (folds.slices(get, 0, sizes) for get in (node.get_weight, node.get_bias))
            for j, n, w, b in zip(concat.inputs, sizes, weights, biases, strict=True):
                more = {"inputs": (j,), "shape": (n, *node.shape[1:]), "get_weight": w, "get_bias": b, "groups": n}
                parts.append(dataclasses.replace(copy(node), **more))
        if not parts:
            return False
        made = tuple(self.add(p, i) for p in parts)
        return self.put(i, G.Concat(made, node.shape, node.where, dim=concat.dim))

    def layer_of_parts(self, i: int, node: Any) -> bool:
        """A layer that reads a concatenation is the sum of layers of the parts; the first has the bias."""
        concat = self.before(node)
        if not isinstance(concat, G.Concat) or concat.dim != 0 or len(concat.inputs) > MOST_PARTS:
            return False
        if isinstance(node, G.Conv) and node.groups != 1 or len(concat.shape) not in (1, 3):
            return False
        if isinstance(node, G.Dense) and (len(node.shape) != 1 or len(concat.inputs) > FEW_PARTS):
            return False
        weights = folds.slices(node.get_weight, 1, [self.nodes[j].shape[0] for j in concat.inputs])
        made = []
        for k, (j, w) in enumerate(zip(concat.inputs, weights, strict=True)):
            bias = node.get_bias if k == 0 else G._nothing
            made.append(self.add(dataclasses.replace(copy(node), inputs=(j,), get_weight=w, get_bias=bias), i))
        return self.put(i, G.Sum(tuple(made), node.shape, node.where, signs=(1,) * len(made)))

    # -- layers --------------------------------------------------------------------------------------------------------
    def pooling(self, i: int, node: G.Monotone) -> bool:
        """Equal windows of averages: a convolution of every channel."""
        like = self.like
        if node.window is None or node.adjoint is None or like is None or not node.size or self._joins_dense(i):
            return False
        kernel, stride, padding, value = node.window
        weight = folds.constant(torch.full((node.shape[0], 1, *kernel), value, dtype=torch.float64), like)
        pool = G.AveragePool(
            node.inputs, node.shape, node.where, get_weight=weight, stride=stride, padding=padding,
            groups=node.shape[0], function=node.function, adjoint=node.adjoint,
        )  # fmt: skip
        return self.put(i, pool)

    def _joins_dense(self, i: int) -> bool:
        """Whether a dense layer alone reads what node i moves or averages, and can take it into its weight."""
        node, k = self.nodes[i], i
        while self.alone(k):
            k = self.readers[k][0]
            reader = self.nodes[k]
            if isinstance(reader, G.Dense):
                return self._absorbs(reader, node)
            if not isinstance(reader, G.Reshape):
                return False
        return False

    def _absorbs(self, dense: G.Dense, node: Any) -> bool:
        n = math.prod(self.before(node).shape)
        grows = dense.shape[0] * n
        return len(dense.shape) == 1 and (n <= node.size or grows <= MOST_NUMBERS and n <= 64 * node.size)

    def moved(self, i: int, node: G.Dense) -> bool:
        """What moves or averages the values that a dense layer reads joins its weight."""
        j, k = node.inputs[0], i
        while isinstance(self.nodes[j], G.Reshape) and self.alone(j):
            j = self.nodes[j].inputs[0]
        before = self.nodes[j]
        if not isinstance(before, G.Monotone) or not self.alone(j) or not self._joins_dense(j):
            return False
        source = before.inputs[0]
        inner = self.nodes[source].shape
        weight = folds.through(before, node.get_weight, inner)
        if len(inner) != 1:
            source = self.add(G.Reshape((source,), (math.prod(inner),), before.where), k)
        return self.put(i, dataclasses.replace(copy(node), inputs=(source,), get_weight=weight))

    def padded(self, i: int, node: G.Conv) -> bool:
        """Zeros around a map join the padding; more on one side than on the other make the kernel larger."""
        pad = self.before(node)
        if (
            not isinstance(pad, G.Monotone)
            or pad.places is None
            or not self.alone(node.inputs[0])
            or node.dilation != (1, 1)
        ):
            return False
        sides = folds.zeros_around(pad.places, self.before(pad).shape, pad.shape)
        if sides is None:
            return False
        top, bottom, left, right = (
            p + own for p, own in zip(sides, (node.padding[0],) * 2 + (node.padding[1],) * 2, strict=True)
        )
        grown = max(bottom - top, 0), max(top - bottom, 0), max(right - left, 0), max(left - right, 0)
        weight = node.get_weight
        if any(grown):
            get = weight
            weight = G.Derived(lambda: F.pad(get(), (grown[2], grown[3], grown[0], grown[1])))
        padding = max(top, bottom), max(left, right)
        return self.put(i, dataclasses.replace(_plain(node), inputs=pad.inputs, get_weight=weight, padding=padding))

    def turned(self, i: int, node: G.ConvTranspose) -> bool:
        """A transposed convolution of stride 1 is one with the kernel turned around."""
        shape = node.get_weight().shape
        padding = [d * (k - 1) - p for d, k, p in zip(node.dilation, shape[2:], node.padding, strict=True)]
        if node.stride != (1, 1) or node.output_padding != (0, 0) or min(padding) < 0:
            return False
        conv = G.Conv(
            node.inputs, node.shape, node.where, get_weight=folds.turned(node.get_weight, node.groups),
            get_bias=node.get_bias, padding=(padding[0], padding[1]), dilation=node.dilation, groups=node.groups,
        )  # fmt: skip
        return self.put(i, conv)


def _plain(node: Any) -> Any:
    """A copy whose weight may become another."""
    if not isinstance(node, G.AveragePool):
        return copy(node)
    given: dict[str, Any] = {f.name: getattr(node, f.name) for f in dataclasses.fields(G.Conv)}
    return copy(G.Conv(**given))
