"""Random models of ordinary PyTorch: names that share memory, in-place operations, views written through, flags, hooks,
wrappers."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 6  # numbers of every tensor of a program, per example
State = dict[str, Tensor]
Action = Callable[["Program", State], None]
NAMES = ("a", "b", "c")


def _assign(target: str, f: Callable[[Program, State], Tensor]) -> Action:
    def act(m: Program, s: State) -> None:
        s[target] = f(m, s)

    return act


def _write(target: str, f: Callable[[Program, State, Tensor], Any]) -> Action:
    """Changes the tensor behind a name, whoever else holds it; the result is not assigned."""

    def act(m: Program, s: State) -> None:
        f(m, s, s[target])

    return act


def _into_fresh(target: str, source: str, k: int) -> Action:
    def act(m: Program, s: State) -> None:
        out = torch.zeros(len(s[source]), N) if k % 2 else torch.empty_like(s[source]).fill_(0.5)
        out[:, k:] = s[source][:, k:]
        out[:, :1] += 0.25
        out = out if k < 3 else torch.full((1, N), 0.5).expand(len(out), N).clone().add_(out)
        s[target] = out

    return act


def _loop(target: str, source: str) -> Action:
    def act(m: Program, s: State) -> None:
        parts = [s[source][:, i] * (i - 2.5) for i in range(s[source].shape[1])]
        s[target] = torch.stack(parts, 1)

    return act


def _add(target: str, other: str) -> Action:
    def act(m: Program, s: State) -> None:
        s[target] += s[other]

    return act


def action(r: random.Random) -> Action:
    t, o, k = r.choice(NAMES), r.choice(NAMES), r.randrange(1, N - 1)
    w = round(r.uniform(-1.5, 1.5), 2)
    layer = r.choice(("first", "second"))
    return r.choice(
        [
            _assign(t, lambda m, s: getattr(m, layer)(s[o])),
            _assign(t, lambda m, s: getattr(m, layer)(s[o])),
            _assign(t, lambda m, s: s[o]),  # another name of the same tensor
            _assign(t, lambda m, s: s[o].view(-1, 2, 3).view(-1, N)),
            _assign(t, lambda m, s: s[o].view(-1, 2, 3).transpose(1, 2).reshape(-1, N)),
            _assign(t, lambda m, s: F.relu(s[o])),
            _assign(t, lambda m, s: F.relu(s[o], inplace=True)),
            _assign(t, lambda m, s: m.act(s[o])),
            _assign(t, lambda m, s: s[t] + w * s[o]),
            _assign(t, lambda m, s: torch.cat(s[o].chunk(2, 1)[::-1], dim=1)),
            _assign(t, lambda m, s: torch.cat([s[t][:, :k], s[o][:, k:]], 1)),
            _assign(t, lambda m, s: s[o].flip(1) - w),
            _assign(t, lambda m, s: torch.tanh(s[o])),
            _assign(t, lambda m, s: s[o].clamp(min=-0.5, max=abs(w))),
            _assign(t, lambda m, s: m.conv(s[o].view(-1, 1, 2, 3)).flatten(1)),
            _assign(t, lambda m, s: m.norm(s[o])),
            _assign(t, lambda m, s: s[o] @ m.matrix + m.config.shift),
            _assign(t, lambda m, s: F.dropout(s[o], 0.5, training=m.training)),
            _assign(t, lambda m, s: s[o] * m.table["gain"] if m.flags[0] else -s[o]),
            _assign(t, lambda m, s: F.max_pool1d(s[o].unsqueeze(1), 3, 1, 1).squeeze(1)),
            _assign(t, lambda m, s: s[o].clone()),
            _assign(t, lambda m, s: s[o].detach()),
            _assign(t, lambda m, s: s[o].abs()),
            _assign(t, lambda m, s: torch.maximum(s[t], s[o])),
            _assign(t, lambda m, s: s[o][:, m.order]),
            _write(t, lambda m, s, h: h.relu_()),
            _write(t, lambda m, s, h: m.act(h.view(-1, 2, 3))),
            _write(t, lambda m, s, h: F.leaky_relu(h, 0.1, inplace=True)),
            _write(t, lambda m, s, h: h.add_(w)),
            _write(t, lambda m, s, h: h.mul_(w)),
            _write(t, lambda m, s, h: h[:, k:].mul_(w)),
            _write(t, lambda m, s, h: h.view(-1, 2, 3)[:, 0].sub_(w)),
            _write(t, lambda m, s, h: h[:, ::2].copy_(s[o][:, 1::2])),
            _write(t, lambda m, s, h: h.t()[k].add_(s[o][:, 0])),
            _write(t, lambda m, s, h: h.data.mul_(0.5)),
            _write(t, lambda m, s, h: h[:, k].zero_()),
            _write(t, lambda m, s, h: h.clamp_(-1, 1)),
            _write(t, lambda m, s, h: torch.add(h, s[o], out=h)),
            _write(t, lambda m, s, h: h.select(1, k).fill_(w)),
            _write(t, lambda m, s, h: h.__setitem__((slice(None), slice(k, None)), s[o][:, k:])),
            _write(t, lambda m, s, h: h.masked_fill_(m.mask, w)),
            _add(t, o),
            _add(t, o),
            _into_fresh(t, o, k),
            _loop(t, o),
        ]
    )


class Program(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        r = random.Random(seed)
        torch.manual_seed(seed)
        self.first, self.second, self.act = nn.Linear(N, N), nn.Linear(N, N), nn.ReLU(inplace=True)
        self.conv, self.norm = nn.Conv2d(1, 2, (1, 3), padding=(0, 1), stride=(1, 2)), nn.BatchNorm1d(N)
        self.conv = nn.Conv2d(1, 1, (2, 3), padding="same")
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.matrix = nn.Parameter(torch.randn(N, N) / 2)
        self.table, self.config, self.flags = {"gain": 0.7}, types.SimpleNamespace(shift=0.3), [r.random() < 0.7]
        self.order, self.mask = torch.randperm(N), torch.rand(N) < 0.3
        self.actions = [action(r) for _ in range(r.randrange(3, 12))]
        self.result = r.choice(NAMES)

    def forward(self, x: Tensor, *, stop: int | None = None) -> Tensor:
        s = {"a": self.first(x), "b": x, "c": x.clone()}
        for act in self.actions if stop is None else self.actions[:stop]:
            act(self, s)
        return s[self.result] if stop is None else self.second(s[self.result])
