"""Two processes that train on halves of every batch, by methods that keep something; test_losses starts them."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor, distributed

from fastrobust import training
from fastrobust.training import adversarial, weights
from fastrobust.training.method import Batch
from method_helpers import EPS, blobs, net


def train(rank: int, world: int) -> dict[str, Tensor]:
    model, (x, y) = net(), blobs(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    own = slice(rank * 12 // world, (rank + 1) * 12 // world)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters() if world > 1 else ():
            distributed.all_reduce(p.grad.div_(world))  # type: ignore[union-attr]
        optimizer.step()

    torch.manual_seed(7)
    method = weights.AWP(adversarial.PGD(EPS, steps=2), gamma=0.1)
    for step in range(4):
        method.step(model, Batch(x[own], y[own], torch.arange(12)[own], 0, 1, step, 4), update)
    return model.state_dict()


STILL: dict[str, Any] = {"shift": 0, "flip": False}
KEEPING: dict[str, dict[str, Any]] = {
    "atta": STILL,
    "atas": STILL | {"warm_up": 1, "resets": (3,)},
    "adaptive-targets": STILL | {"warm_up": 1},
    "free": {"replays": 2},
}


def keeping(name: str) -> dict[str, Tensor]:
    """Batches of 5 of 12: a process has another number of examples than the other, and other ones in every epoch."""
    model, (x, y) = net(), blobs(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(7)
    method = training.make(name, eps=EPS, **KEEPING[name])
    training.train(model, training.loader(x, y, 5, seed=1), method, epochs=4, optimizer=optimizer)
    return model.state_dict()


if __name__ == "__main__":
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save({"awp": train(rank, 2), **{name: keeping(name) for name in KEEPING}}, f"{out}{rank}")
    distributed.barrier()
    os._exit(0)  # gloo's threads may end badly once the other process is gone; what was found is on disk
