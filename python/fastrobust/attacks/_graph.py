"""CUDA-graph replay of an attack step: forward, loss, backward to the input and the fused update in one launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP = 3
_cache: weakref.WeakKeyDictionary[Any, dict[Any, CapturedStep]] = weakref.WeakKeyDictionary()
_KEPT = 4  # graphs a model keeps: each holds the memory of one forward and backward


class CapturedStep:
    """``step(tensors)`` recorded once over static copies of its tensors; ``tensors[0]`` is updated in place."""

    def __init__(self, step: Callable[[list[Tensor]], None], tensors: list[Tensor]) -> None:
        self.static = [t.detach().clone() for t in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisation and autotuning happen outside the graph
            for _ in range(_WARM_UP):
                step(self.static)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step(self.static)

    def run(self, tensors: list[Tensor], steps: int, tick: Callable[[int], object]) -> Tensor:
        for static, given in zip(self.static, tensors, strict=True):
            static.copy_(given)
        for _ in range(steps):
            self.graph.replay()
            tick(1)
        return self.static[0].clone()


def captured(model: Any, key: Any, step: Callable[[list[Tensor]], None], tensors: list[Tensor]) -> CapturedStep:
    """The graph for this model and setting, recorded when it is new.

    A graph reads the weights where they lay when it was recorded: in-place training is seen, moved weights make a new
    graph.
    """
    addresses: tuple[int, ...] = ()
    if isinstance(model, nn.Module):
        addresses = tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
    full_key = (key, addresses, tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors))
    try:
        graphs = _cache.setdefault(model, {})
    except TypeError:  # a callable that cannot be referred to weakly: no cache
        return CapturedStep(step, tensors)
    if full_key not in graphs:
        while len(graphs) >= _KEPT:
            graphs.pop(next(iter(graphs)))
        graphs[full_key] = CapturedStep(step, tensors)
    return graphs[full_key]
