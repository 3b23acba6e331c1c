"""Steps of certified training against what others compute: time on the same batches, from the same weights, in one
process.

    python -m benchmarks.certified_speed [--data FOLDER] [--batches 5] [--rounds 5] [--rows WORD ...] [--out FILE.json]

"l-per" and "i-per" stand against the way in which the thesis' own code computes the envelope: forwards, the map
from the input to every hidden neuron of every example materialised (B, n, M), and distances by masked passes over
(B, K, M) until all coordinates are inside the box. "ibp" and "crown-ibp" stand against auto_LiRPA. A step is the
loss (3.20) or (3.1), its gradient and Adam. The two take turns; the ratio is the median over rounds. Bars: 10 times
the thesis, 3 times auto_LiRPA. ``apart``: relative difference of the first step's losses.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust import data
from fastrobust.models import mnist_cnn
from fastrobust.training.certified import worst_case_loss
from fastrobust.training.envelope import envelope_loss

from .table_file import TableFile

ALPHA, BETA, COUNT = 0.15, 0.1, 4  # table 3.5
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Batches = list[tuple[Tensor, Tensor]]


def fc1(width: int = 1024) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))


def materialised(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(U, p) of (3.12) for all 10 classes, forwards, by Fast-Lin's lines (those of IBP for one hidden layer)."""
    first, last = model.get_submodule("1"), model.get_submodule("3")
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    point = x.flatten(1)
    low, high = (point - eps).clamp(min=0), (point + eps).clamp(max=1)
    W = first.weight.expand(len(x), -1, -1)
    positive, negative = W.clamp(min=0), W.clamp(max=0)
    lower, upper = (
        (torch.bmm(positive, a.unsqueeze(2)) + torch.bmm(negative, b.unsqueeze(2))).squeeze(2) + first.bias
        for a, b in ((low, high), (high, low))
    )
    unstable = (lower < 0) & (upper > 0)
    slope = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), (lower >= 0).to(lower))
    height = torch.where(unstable, -lower * slope, 0.0)
    D = slope.unsqueeze(2) * W  # (B, n, M)
    offset = slope * first.bias
    rows = last.weight[y].unsqueeze(1) - last.weight
    U = torch.bmm(rows, D)
    p = torch.bmm(rows, offset.unsqueeze(2)).squeeze(2) + torch.bmm(rows.clamp(max=0), height.unsqueeze(2)).squeeze(2)
    return U, p + last.bias[y].unsqueeze(1) - last.bias


def passes(U: Tensor, p: Tensor, x: Tensor) -> Tensor:
    """Signed l-inf distances (B, K): the step without a box, what leaves it fixed at its walls, again until none
    does."""
    point = x.flatten(1)
    low, high = (-point).unsqueeze(1), (1 - point).unsqueeze(1)
    margin = torch.bmm(U, point.unsqueeze(2)).squeeze(2) + p
    at_low, at_high = torch.zeros_like(U), torch.zeros_like(U)
    step = -margin.unsqueeze(2) * U.sign() / (U.abs().sum(2, keepdim=True) + 1e-8)
    for _ in range(20):
        if bool((step >= low - 1e-6).all()) and bool((step <= high + 1e-6).all()):
            break
        at_low = at_low + (step < low - 1e-6).to(U)
        at_high = at_high + (step > high + 1e-6).to(U)
        fixed = at_low * low + at_high * high
        rest = 1 - at_low - at_high
        free = U * rest
        left = (U * fixed).sum(2) + margin
        step = fixed - left.unsqueeze(2) * free.sign() / (free.abs().sum(2, keepdim=True) + 1e-8)
    return step.abs().amax(2) * margin.sign()


def thesis_loss(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    U, p = materialised(model, x, y, eps)
    distances = passes(U, p, x).scatter(1, y.unsqueeze(1), -100.0)
    nearest = distances.topk(COUNT + 1, 1, largest=False).values[:, 1:]
    return F.cross_entropy(model(x), y) + BETA * (1 - nearest / ALPHA).clamp(min=0).sum(1).mean()


def envelope(method: str, eps: float) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = envelope_loss(model, x, y, eps, alpha=ALPHA, method=method, count=COUNT, check="none")
        return F.cross_entropy(model(x), y) + BETA * found.mean()

    return loss


def bounded(method: str, eps: float) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return worst_case_loss(model, x, y, eps, method=method, clip=(0.0, 1.0), check="none")

    return loss


class Theirs:
    """auto_LiRPA's cross-entropy of the worst case, of the one model that it is first called with."""

    def __init__(self, method: str, eps: float) -> None:
        self.method, self.eps, self.module = method, eps, None

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        peer: Any = importlib.import_module("auto_LiRPA")

        if self.module is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.module = peer.BoundedModule(model, x, device="cpu")
        eye = torch.eye(10)
        C = (eye[y][:, None] - eye[None])[~eye[y].bool()].view(len(y), 9, 10)
        low, up = (x - self.eps).clamp(0, 1), (x + self.eps).clamp(0, 1)
        given = peer.BoundedTensor(x, peer.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=up))
        found: Any = self.module
        margins = found.compute_bounds(x=(given,), C=C, method=self.method, bound_upper=False)[0]
        logits = torch.cat([torch.zeros_like(margins[:, :1]), -margins], 1)
        return F.cross_entropy(logits, torch.zeros_like(y))


def rows(words: list[str]) -> list[tuple[str, Callable[[], nn.Sequential], Loss, Callable[[], Loss], float]]:
    """Name, network, our loss, theirs, bar."""
    found: list[Any] = []
    for name, method in (("l-per", "fast-lin"), ("i-per", "ibp-linear")):
        found.append(
            (
                f"{name} fc1",
                fc1,
                envelope(method, 0.05),
                lambda: lambda model, x, y: thesis_loss(model, x, y, 0.05),
                10.0,
            )
        )
    for name, peer in (("ibp", "IBP"), ("crown-ibp", "CROWN-IBP")):
        for net, build, eps in (("fc1", fc1, 0.1), ("cnn", mnist_cnn, 0.1)):
            found.append((f"{name} {net}", build, bounded(name, eps), lambda m=peer, e=eps: Theirs(m, e), 3.0))
    return [row for row in found if any(word in row[0] for word in words)]


def epoch(model: nn.Module, loss: Loss, batches: Batches) -> tuple[float, float]:
    """Seconds, and the first step's loss."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    first = None
    start = time.perf_counter()
    for x, y in batches:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, x, y)
        value.backward()
        optimizer.step()
        first = value.item() if first is None else first
    return time.perf_counter() - start, first or 0.0


def measure(
    build: Callable[[], nn.Sequential], our: Loss, peer: Callable[[], Loss], batches: Batches, rounds: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    start = build()
    epoch(start, lambda m, x, y: F.cross_entropy(m(x), y), batches * 4)
    mine, other, apart = [], [], 0.0
    for k in range(rounds + 1):  # the first round warms up
        a, first = epoch(copy.deepcopy(start), our, batches)
        b, second = epoch(copy.deepcopy(start), peer(), batches)
        apart = abs(first - second) / abs(second)
        if k:
            mine.append(a)
            other.append(b)
    ratio = statistics.median(t / s for s, t in zip(mine, other, strict=True))
    steps = len(batches)
    return {
        "ours_ms": 1e3 * statistics.median(mine) / steps, "theirs_ms": 1e3 * statistics.median(other) / steps,
        "ratio": ratio, "apart": apart,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="WORD")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args(argv)
    found = data.load("mnist", "train", folder=args.data, limit=args.batch * args.batches)
    batches = list(zip(found.images.split(args.batch), found.labels.split(args.batch), strict=True))
    table = TableFile(args.out, "steps of certified training against the thesis' way and auto_LiRPA")
    print(f"{'step':<18}{'ours ms':>10}{'theirs ms':>11}{'ratio':>8}{'bar':>6}{'apart':>10}")
    for name, build, our, peer, bar in rows(args.rows):
        try:
            row = measure(build, our, peer, batches, args.rounds)
        except ImportError as error:
            print(f"{name:<18} skipped: {error}")
            continue
        print(
            f"{name:<18}{row['ours_ms']:10.1f}{row['theirs_ms']:11.1f}{row['ratio']:8.1f}{bar:6.0f}{row['apart']:10.1e}",
            flush=True,
        )
        table.add(name, row | {"bar": bar, "met": row["ratio"] >= bar, "batch": args.batch, "batches": args.batches})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
