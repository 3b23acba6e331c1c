"""A graph of masked convolutions, and what lies between them, in the fast layout; forward and input gradient.

A node is one convolution with what follows it in one write (scale and shift of eval-mode batch normalisation, magnitude
and bias; residual; activation), a pooling, a concatenation (see ``_nodes``). Batches are done in groups of images small
enough for the caches; each group runs through all nodes before the next. Nodes for which torch is faster run there, on
plain tensors; a value is copied between the two forms only where nodes of both kinds read it.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..ops.binary import _conv_cost as cost
from ..ops.binary import _feature_maps as fm
from ..ops.binary._dense_conv import in_full_precision
from ..ops.binary._feature_maps import Maps
from ._choice import Chooser, Part
from ._group import Graph, Group, Read
from ._nodes import Concat, Node, Size, Unit
from ._region_forward import Forward
from ._region_grad import Backward
from ._schedule import ARENA, Compiled

# Batch and map sizes whose programs and memory are kept.
REMEMBERED = 8


# By height, width and the stride of who reads them.
Borders = dict[tuple[tuple[int, int], tuple[int, int]], tuple[int, int]]


@dataclasses.dataclass
class Resolved:
    """Everything about one batch size and map size."""

    sizes: dict[int, Size]
    groups: list[tuple[int, Group]]  # the first image of each


class Region(Graph):
    """Runs its nodes forward, and the gradient back to its inputs."""

    def __init__(self, nodes: list[Node], inputs: int, outputs: list[int]) -> None:
        super().__init__(nodes, inputs, outputs)
        self.resolved: collections.OrderedDict[Any, Resolved] = collections.OrderedDict()
        self.latest: Group | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Programs and memory belong to this process; copies and pickles make their own.
        return {**self.__dict__, "resolved": collections.OrderedDict(), "latest": None}

    # ---- layouts ----

    def resolve(self, batch: int, inputs: list[Size], device: tuple[int, int]) -> Resolved:
        """Groups of images, and the path of each node, for inputs (C, H, W)."""
        key = (batch, tuple(inputs), device[0], cost.forced_path())
        if key in self.resolved:
            self.resolved.move_to_end(key)
            return self.resolved[key]
        sizes: dict[int, Size] = {-1 - i: s for i, s in enumerate(inputs)}
        for i, node in enumerate(self.nodes):
            sizes[i] = node.out_size(sizes)
        borders = self._borders(sizes)
        made: dict[int, Group] = {}
        groups, begin = [], 0
        for part in Chooser(self.nodes, self.inputs, self.outputs, sizes).parts(batch) if batch else ():
            if id(part) not in made:
                made[id(part)] = self._group(part, sizes, borders)
            groups.append((begin, made[id(part)]))
            begin += part.count
        found = self.resolved[key] = Resolved(sizes, groups)
        while len(self.resolved) > REMEMBERED:
            self.resolved.popitem(last=False)
        return found

    def _borders(self, sizes: dict[int, Size]) -> Borders:
        """Rows of zeros above and below, and columns on the left, that every reader of maps of a size and stride
        needs."""
        found: Borders = collections.defaultdict(lambda: (0, 0))

        def need(size: tuple[int, int], stride: tuple[int, int], halo: int, lead: int) -> None:
            before = found[size, stride]
            found[size, stride] = max(before[0], halo), max(before[1], lead)

        for i, node in enumerate(self.nodes):
            if not isinstance(node, Unit) or node.packed is None:
                continue
            (channels, *_), size, g = sizes[node.source], sizes[node.source][1:], node.geometry
            read = fm.input_maps(1, channels, *size, node.shape, g, 1)
            need(size, g.stride, read.halo, read.lead)
            if g.stride == (2, 2):  # which may be read where it lies
                need(size, (1, 1), *fm.strided_room(node.shape, g, size, sizes[i][1:]))
            grad = fm.grad_maps(1, *size, node.shape, g, 1)[0]
            need(sizes[i][1:], (1, 1), grad.halo, grad.lead)
        return found

    def _group(self, part: Part, sizes: dict[int, Size], borders: Borders) -> Group:
        """Layouts of all values and the way every node runs."""
        count, lanes = part.count, part.lanes

        def maps(size: Size, pitch: int) -> Maps:
            return Maps(count, *size, lanes, pitch, *borders[size[1:], (1, 1)])

        native = {v: maps(s, s[2] + borders[s[1:], (1, 1)][1]) for v, s in sizes.items() if v < 0}
        reads = []
        for i, node in enumerate(self.nodes):
            given, size = native[node.source], sizes[i]
            read, lead = given, borders[size[1:], (1, 1)][1]
            pitch = size[2] + lead
            if isinstance(node, Unit) and node.packed is not None:
                source = sizes[node.source]
                need = fm.input_maps(count, *source, node.shape, node.geometry, lanes)
                pitch = max(need.phase_size[1] + need.lead, pitch)
                if need.phases != given.phases or given.pitch < pitch:
                    edges = borders[source[1:], node.geometry.stride]
                    read = Maps(count, *source, lanes, max(pitch, need.phase_size[1] + edges[1]), *edges, need.phases)
                pitch = read.pitch
            elif isinstance(node, Concat):
                pitch = max(native[v].pitch for v in node.parts)
            native[i] = maps(size, pitch)
            reads.append(Read(read, native[i], part.choices[i]))
        return Group(part, reads, native)

    # ---- running ----

    def forward(self, inputs: list[Tensor], keep: bool) -> tuple[list[Tensor], list[Any]]:
        """Outputs, and per group of images what the backward needs (nothing unless `keep`)."""
        for x in inputs:
            if x.dtype != torch.float32 or x.device != self.device:
                raise TypeError(f"x: expected float32 on {self.device}, got {x.dtype} on {x.device}")
        batch = inputs[0].shape[0]
        if any(x.shape[0] != batch for x in inputs):
            raise ValueError(f"x: expected equal batch sizes inside the model, got {[x.shape[0] for x in inputs]}")
        sizes: list[Size] = [tuple(x.shape[1:]) for x in inputs]  # type: ignore[misc]
        how = self.resolve(batch, sizes, fm.device_of(inputs[0]))
        whole = len(how.groups) == 1
        outs: list[Any] = [None] * len(self.outputs)
        for k, v in enumerate(self.outputs):
            # What torch makes of the whole batch is handed out as it is.
            if not (whole and how.groups[0][1].reads[v].dense):
                outs[k] = inputs[0].new_empty((batch, *how.sizes[v]))
        saved = []
        for begin, group in how.groups:
            self.latest = group if begin == 0 or self.latest is None else self.latest
            end = begin + group.part.count
            parts = [x if whole else x[begin:end] for x in (*inputs, *(o for o in outs if o is not None))]
            strides = tuple([x.stride() for x in parts])
            found = group.forward.get((keep, strides))
            if found is None:
                found = group.forward[keep, strides] = Forward(
                    self, group, parts, keep, [o is not None for o in outs]
                ).compile()
            program, gates, made = found
            with in_full_precision(parts[0]):
                state = program.run(parts)
            for k, base in made:
                # The state must not hold on to what will hold on to it, and who gets a view may not write into it.
                out, state.tensors[base] = state.tensors[base], None
                assert out is not None
                outs[k] = out.data if out._is_view() else out
            if keep:
                saved.append((begin, group, strides, gates, state))
        return outs, saved

    def backward(
        self, grads: list[Tensor | None], saved: list[Any], sizes: list[Any], formats: list[Any]
    ) -> list[Tensor]:
        """Gradients of the inputs of `sizes`, in memory formats as they came."""
        device = next(g for g in grads if g is not None).device
        outs = [
            torch.empty(size, dtype=torch.float32, device=device, memory_format=f)
            for size, f in zip(sizes, formats, strict=True)
        ]
        wanted = tuple(g is not None for g in grads)
        for begin, group, strides, gates, state in saved:
            parts = [g for g in (*grads, *outs) if g is not None]
            if len(saved) > 1:
                parts = [g[begin : begin + group.part.count] for g in parts]
            key = (wanted, strides, tuple(x.stride() for x in parts))
            found: tuple[Compiled, list[int]] | None = group.backward.get(key)
            if found is None:
                found = group.backward[key] = Backward(self, group, gates, state, parts, wanted).compile()
            program, results = found
            with in_full_precision(outs[0]):
                program.run([state.tensors[ARENA], *parts, *[state.tensors[base] for base in results]])
        return outs
