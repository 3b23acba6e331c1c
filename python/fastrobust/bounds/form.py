"""A graph that is given another form, node by node: who reads whom, and what is left to look at."""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

import torch

from fastrobust.bounds import graph as G

MOST_PARTS = 16  # of a concatenation that is taken apart before convolutions
FEW_PARTS = 4  # before dense layers, of which one large is faster than many small


class Form:
    """Nodes by number, each of which computes the same value throughout; rules give one node another form at a time."""

    def __init__(self, graph: G.Graph):
        self.graph, self.output = graph, graph.output
        wanted = graph.ancestors[graph.output] | {0}
        self.nodes = {i: copy(n) for i, n in enumerate(graph.nodes) if i in wanted}
        self.readers: dict[int, list[int]] = {i: [] for i in self.nodes}
        self.rank: dict[int, float] = {i: float(i) for i in self.nodes}  # where a node stood, for the order at the end
        self.places: Any = None  # of the input's numbers in the graph, where they have another order
        self.next = len(graph.nodes)
        self.same: dict[int, int] = {}  # nodes that another one stands for
        for i, n in self.nodes.items():
            for j in n.inputs:
                self.readers[j].append(i)
        self.left = sorted(self.nodes, reverse=True)
        self.queued = set(self.left)
        layers = (n for n in self.nodes.values() if isinstance(n, (G.Dense, G.Conv, G.ConvTranspose)))
        self.like: G.Getter | None = next((n.get_weight for n in layers), None)  # constants take its type and device

    # -- changes -------------------------------------------------------------------------------------------------------
    def add(self, node: G.Node, near: int) -> int:
        i = self.next = self.next + 1
        self.nodes[i], self.readers[i], self.rank[i] = node, [], self.rank[near]
        for j in node.inputs:
            self.readers[j].append(i)
        self._again(i)
        return i

    def put(self, i: int, node: G.Node) -> bool:
        """Node i computes its value in another way."""
        old = self.nodes[i]
        for j in node.inputs:
            self.readers[j].append(i)
        self.nodes[i] = node
        for j in old.inputs:
            self._unread(j, i)
        self._again(i, *self.readers[i])
        return True

    def bypass(self, i: int, j: int) -> bool:
        """Node j has the value of node i: whatever reads i reads j."""
        self.same[i] = j
        if self.output == i:
            self.output = j
        for k in list(self.readers[i]):
            node = self.nodes[k]
            node.inputs = tuple(j if t == i else t for t in node.inputs)
            self.readers[j].append(k)
            self._again(k)
        self.readers[i] = []
        for t in self.nodes[i].inputs:
            self._unread(t, i)
        self._again(j)
        return True

    def _unread(self, j: int, i: int) -> None:
        self.readers[j].remove(i)
        self._again(j, *self.readers[j])
        if not self.readers[j] and j != self.output and j:
            for t in self.nodes[j].inputs:
                self._unread(t, j)

    def _again(self, *nodes: int) -> None:
        for i in nodes:
            if i not in self.queued:
                self.queued.add(i)
                self.left.append(i)

    # -- questions -----------------------------------------------------------------------------------------------------
    def alive(self, i: int) -> bool:
        return i == self.output or i == 0 or bool(self.readers[i])

    def alone(self, i: int) -> bool:
        """Whether one node alone reads i."""
        return len(self.readers[i]) == 1 and i != self.output

    def before(self, node: G.Node) -> Any:
        return self.nodes[node.inputs[0]]

    def layer_below(self, i: int, parts: int) -> bool:
        """Whether a layer that is taken apart for so many parts reads node i, perhaps behind what moves out of its
        way."""
        left, seen = [i], set()
        while left:
            for k in self.readers[left.pop()]:
                node = self.nodes[k]
                if isinstance(node, G.Dense) and parts <= FEW_PARTS or isinstance(node, G.Conv) and node.groups == 1:
                    return True
                moves = (G.Activation, G.MaxPool, G.Scale, G.Reshape, G.Concat, G.Conv)
                if k not in seen and isinstance(node, moves):
                    seen.add(k)
                    left.append(k)
        return False

    # -- ends ----------------------------------------------------------------------------------------------------------
    def enter(self) -> None:
        """Takes what is done to the input before anything else out of the graph: maps of another shape, other
        orders."""
        while self.readers[0] and self.output not in (0, *self.readers[0]):
            made = [self.nodes[i] for i in self.readers[0]]
            kinds = {type(n) for n in made}
            if kinds == {G.Reshape} and len(made[0].shape) == 3 and len(self.nodes[0].shape) != 3:
                found = None
            elif kinds == {G.Monotone} and all(bijective(n, self.nodes[0]) for n in made):
                found = made[0].places
                if any(not torch.equal(n.places, found) for n in made):
                    return
            else:
                return
            if len({n.shape for n in made}) != 1:
                return
            if found is not None:
                self.places = found if self.places is None else self.places[found]
            self.nodes[0] = G.Input((), made[0].shape, self.nodes[0].where)
            for i in list(self.readers[0]):
                self.bypass(i, 0)

    def made(self) -> G.Graph:
        wanted, left = {0}, [self.output]
        while left:
            i = left.pop()
            if i not in wanted:
                wanted.add(i)
                left += self.nodes[i].inputs
        missing = {i: len(set(self.nodes[i].inputs)) for i in wanted}
        readers: dict[int, set[int]] = {i: set() for i in wanted}
        for i in wanted:
            for j in self.nodes[i].inputs:
                readers[j].add(i)
        ready = [(self.rank[i], i) for i in wanted if not missing[i]]
        heapq.heapify(ready)
        number: dict[int, int] = {}
        while ready:
            _, i = heapq.heappop(ready)
            number[i] = len(number)
            for k in readers[i]:
                missing[k] -= 1
                if not missing[k]:
                    heapq.heappush(ready, (self.rank[k], k))
        nodes = []
        for i in number:
            node = copy(self.nodes[i])
            node.inputs = tuple(number[j] for j in node.inputs)
            nodes.append(node)
        reads = [(name, shape, self._pieces(value, number)) for name, shape, value in self.graph.reads or ()]
        outer, inner = self.graph.nodes[0].shape, nodes[0].shape
        entry = None if outer == inner and self.places is None else G.Entry(outer, inner, self.places)
        return G.Graph(nodes, number[self.output], self.graph.result, reads, entry, self.graph.log_softmax)

    def _pieces(self, i: int, number: dict[int, int]) -> G.Pieces:
        """Where the value of node i of the model's own graph lies now."""
        if i in number:
            return number[i]
        if i in self.same:
            return self._pieces(self.same[i], number)
        node = self.nodes.get(i)
        if isinstance(node, G.Reshape):
            return self._pieces(node.inputs[0], number)
        if isinstance(node, G.Monotone) and bijective(node, self.before(node)):
            return node.places, [(self.before(node).shape, self._pieces(node.inputs[0], number))]
        if isinstance(node, G.Concat):
            return node.dim, [(self.nodes[j].shape, self._pieces(j, number)) for j in node.inputs]
        return (0, [])


def bijective(node: Any, before: G.Node) -> bool:
    """Whether node has every number of the one before once."""
    places = node.places
    return (
        places is not None and node.size == before.size and torch.equal(places.sort().values, torch.arange(node.size))
    )


def copy(node: Any) -> Any:
    return dataclasses.replace(node, index=-1, consumers=[])
