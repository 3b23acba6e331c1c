"""Training on several processes (torchrun): what they share, in small functions that do nothing on one process.

Gradients are averaged after each backward pass, weighted by the examples behind them; methods and attacks run on the
module itself, so that any method trains on any number of processes, and passes may differ in number between them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PIECE = 1 << 24  # numbers sent at a time


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[torch.device]:
    """Under torchrun: the process group for the time of the block, and this process' own device; else nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def start_equal(model: nn.Module) -> None:
    """Every process begins with the parameters and buffers of the first."""
    if rank_and_world()[1] > 1:
        with torch.no_grad():
            for t in (*model.parameters(), *model.buffers()):
                dist.broadcast(t, 0)


def average_gradients(parameters: Iterable[Tensor], loss: Tensor, examples: int) -> float:
    """Gradients of the mean over all processes' examples, in place; returns the mean loss (NaN for all if for one)."""
    value = loss.detach().float()
    if rank_and_world()[1] == 1:
        return float(value)
    shared = [p for p in parameters if p.requires_grad]
    # what is in no process' loss keeps no gradient; what is in one process' loss has one on all
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
    there = torch.tensor([float(p.grad is not None) for p in shared], device=value.device)
    count = torch.tensor([float(examples)], device=value.device)
    flat = torch.cat([*(g.reshape(-1).float() for g in grads), value.reshape(1)]) * count
    flat = torch.cat([flat, there, count])
    dist.all_reduce(flat)
    *parts, mean, there, count = flat.split([*(g.numel() for g in grads), 1, len(shared), 1])
    for p, part, some in zip(shared, parts, there.tolist(), strict=True):
        if some:
            p.grad = (part / count).view_as(p).to(p.dtype)
    return float(mean / count)


def average_statistics(model: nn.Module) -> None:
    """Floating-point buffers (running statistics) become their mean over the processes."""
    world = rank_and_world()[1]
    if world > 1:
        with torch.no_grad():
            for b in model.buffers():
                if b.is_floating_point():
                    dist.all_reduce(b)
                    b /= world


def total(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Sums over the processes, in float64. Every process has the same names."""
    if rank_and_world()[1] == 1:
        return values
    names = sorted(values)
    # gloo and NCCL both add float64
    sums = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return dict(zip(names, sums.tolist(), strict=True))


def gather(value: Any) -> list[Any]:
    """The value of every process, on every process, by rank."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value)
    return found


def exchange_rows(tensors: Sequence[Tensor], written: Tensor) -> None:
    """Rows that one process wrote become everybody's, in place; of a row that several wrote the first one's.

    tensors: (N, ...) each, alike on all processes but for the rows that were written since the last exchange; written:
    (N,) bool, this process' ones, cleared. Rows travel as they are kept, in pieces.
    """
    rank, world = rank_and_world()
    if world > 1:
        device = _talks_on()
        owner = torch.where(written, rank, world).to(device)
        dist.all_reduce(owner, dist.ReduceOp.MIN)
        for source in range(world):
            rows = (owner == source).nonzero()[:, 0]
            for tensor in tensors:
                size = max(1, _PIECE // max(1, tensor[:1].numel()))
                for part in rows.to(tensor.device).split(size):
                    values = tensor[part].to(device, torch.uint8 if tensor.dtype == torch.bool else None)
                    dist.broadcast(values, source)
                    tensor[part] = values.to(tensor.device, tensor.dtype)
    written.zero_()


def _talks_on() -> torch.device:
    """NCCL sends what lies on a GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def wait() -> None:
    if rank_and_world()[1] > 1:
        dist.barrier()


__all__ = [
    "average_gradients",
    "average_statistics",
    "exchange_rows",
    "gather",
    "join",
    "rank_and_world",
    "start_equal",
    "total",
    "wait",
]
