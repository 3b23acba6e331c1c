"""Mixed precision of the model alone: its passes run under autocast, attacks and losses stay in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def mixed(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block every call of the model runs under autocast and returns float32, also those of attacks."""
    if dtype is None:
        yield
        return
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"autocast: got {dtype}, expected torch.float16, torch.bfloat16 or None")
    device = next(model.parameters()).device.type
    space, before = vars(model), vars(model).get("forward")
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            out = forward(*args, **kwargs)
        return out.float() if isinstance(out, Tensor) else out

    space["forward"] = run
    try:
        yield
    finally:
        del space["forward"]
        if before is not None:
            space["forward"] = before


class Stepper:
    """Backward pass and one step of the optimiser, with the loss scaling that float16 needs."""

    def __init__(self, optimizer: torch.optim.Optimizer, dtype: torch.dtype | None, device: torch.device) -> None:
        self.optimizer, self.dtype = optimizer, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

    def move(self, max_grad_norm: float | None) -> None:
        if max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


__all__ = ["Stepper", "mixed"]
