"""The processes that torchrun starts, each with its share of the batches; without it there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Workers(NamedTuple):
    """This process' number, how many there are, and the device of this one."""

    rank: int
    world: int
    device: torch.device

    def mine(self, number: int) -> bool:
        """Batches go round by their number. What a batch holds does not depend on how many processes there are."""
        return number % self.world == self.rank

    def gather(self, mine: dict[int, Any]) -> dict[int, Any]:
        """What all of them made, by the number of the batch."""
        if self.world == 1:
            return mine
        gathered: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(gathered, mine)
        return {number: part for share in gathered for number, part in share.items()}


@contextlib.contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Workers(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Workers(rank, world, device)
    finally:
        torch.distributed.destroy_process_group()
