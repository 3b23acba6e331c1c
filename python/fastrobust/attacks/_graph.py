"""CUDA-graph replay of an attack step: forward, loss, backward to the input and the fused update in one launch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_WARM_UP = 3


class Seen(NamedTuple):
    """What a step saw of the model: outputs, loss (per example or one number) and the gradient with respect to x."""

    outputs: Tensor
    value: Tensor
    grad: Tensor


Step = Callable[[tuple[Any, ...]], Seen]
_lock = threading.Lock()
_cache: weakref.WeakKeyDictionary[Any, dict[Any, CapturedStep]] = weakref.WeakKeyDictionary()
_KEPT = 4  # graphs a model keeps: each holds the memory of one forward and backward


class CapturedStep:
    """``step(inputs)`` recorded once over static copies of its tensors; ``inputs[0]`` is updated in place."""

    def __init__(self, step: Step, inputs: tuple[Any, ...]) -> None:
        self.static = tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy initialisation and autotuning happen outside the graph
            for _ in range(_WARM_UP):
                step(self.static)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads go on working
            self.seen = step(self.static)
        self.lock = threading.Lock()
        self.done = torch.cuda.Event()

    def run(self, inputs: tuple[Any, ...], steps: int, tick: Callable[[int], object]) -> tuple[Tensor, Seen]:
        """The last iterate, and what its last step saw. One run at a time: threads and streams share the copies."""
        with self.lock:
            self.done.wait()
            for static, given in zip(self.static, inputs, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(given)
            for _ in range(steps):
                self.graph.replay()
                tick(1)
            found = self.static[0].clone(), Seen(*(t.clone() for t in self.seen))
            self.done.record()
        return found


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
    with _lock:
        graphs = _cache.setdefault(model, {})
        if full_key not in graphs:
            while len(graphs) >= _KEPT:
                graphs.pop(next(iter(graphs)))
            graphs[full_key] = CapturedStep(step, inputs)
        return graphs[full_key]
