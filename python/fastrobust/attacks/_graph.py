"""CUDA-graph replay of an attack step: forward, loss, backward to the input and the fused update in one launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP = 3
Step = Callable[[tuple[Any, ...]], tuple[Tensor, int]]
_cache: weakref.WeakKeyDictionary[Any, dict[Any, CapturedStep]] = weakref.WeakKeyDictionary()
_KEPT = 4  # graphs a model keeps: each holds the memory of one forward and backward


class CapturedStep:
    """``step(inputs)`` recorded once over static copies of its tensors; ``inputs[0]`` is updated in place. It returns the
    loss and the number of classes."""

    def __init__(self, step: Step, inputs: tuple[Any, ...]) -> None:
        self.static = tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisation and autotuning happen outside the graph
            for _ in range(_WARM_UP):
                step(self.static)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.classes = step(self.static)

    def run(self, inputs: tuple[Any, ...], steps: int, tick: Callable[[int], object]) -> Tensor:
        for static, given in zip(self.static, inputs, strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)
        for _ in range(steps):
            self.graph.replay()
            tick(1)
        adv: Tensor = self.static[0].clone()
        return adv


def captured(model: Any, key: Any, step: Step, inputs: tuple[Any, ...]) -> CapturedStep:
    """The graph for this model and setting, recorded when it is new.

    A graph reads the weights where they lay when it was recorded: in-place training is seen, moved weights make a new
    graph. Nothing is kept for a plain callable, whose weights cannot be watched.
    """
    if not isinstance(model, nn.Module):
        return CapturedStep(step, inputs)
    addresses = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    kinds = tuple((t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in inputs)
    full_key = (key, addresses, kinds)
    graphs = _cache.setdefault(model, {})
    if full_key not in graphs:
        while len(graphs) >= _KEPT:
            graphs.pop(next(iter(graphs)))
        graphs[full_key] = CapturedStep(step, inputs)
    return graphs[full_key]
