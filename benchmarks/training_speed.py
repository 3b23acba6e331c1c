"""Epochs of adversarial training of the MNIST CNN: ours, in the papers' own style, and in the leanest plain PyTorch.

    python -m benchmarks.training_speed [--images 1280] [--rounds 7] [--out benchmarks/results/training-speed.json]

The three make the same epoch of PGD-10 (batches of 128, one update each) from the same weights and the same random
starts: "papers" goes back through the parameters in every attack step, as most public code does, "lean" asks for the
input gradient alone and reuses memory where it can. Rounds are interleaved; ratios are of each round, and their median
is printed. The row of dynamic training says what an epoch costs when examples stop, beside the share of the passes that
are made.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import data, models
from fastrobust.training import adversarial, dynamic

from .table_file import TableFile

EPS, STEPS, BATCH = 0.3, 10, 128
Batches = list[tuple[Tensor, Tensor]]
Epoch = Callable[[nn.Module, Batches], Any]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def _start(x: Tensor) -> Tensor:
    """The random start that our methods draw."""
    return fr.ops.random_start(x, EPS, seed=int(torch.randint(0, 2**62, (), dtype=torch.int64)))


def ours(model: nn.Module, batches: Batches) -> None:
    fr.training.train(model, batches, adversarial.PGD(EPS, steps=STEPS), epochs=1, optimizer=_sgd(model))


def dynamically(model: nn.Module, batches: Batches) -> float:
    """Attack steps of an example, on average."""
    method = dynamic.DynamicAT(EPS, steps=STEPS)
    (record,) = fr.training.train(model, batches, method, epochs=1, optimizer=_sgd(model))
    found = record.get("attack_steps")
    return float(method._moves.double().mean()) if found is None and method._moves is not None else float(found or 0)


def papers(model: nn.Module, batches: Batches, steps: int = STEPS, step_size: float = EPS / 4) -> None:
    optimizer = _sgd(model)
    for x, y in batches:
        model.train()
        adv = _start(x)
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            loss = F.cross_entropy(model(adv), y)
            loss.backward()
            adv = adv + step_size * adv.grad.sign()  # type: ignore[union-attr]
            adv = torch.clamp(torch.min(torch.max(adv, x - EPS), x + EPS), 0.0, 1.0)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(adv.detach()), y)
        loss.backward()
        optimizer.step()


def lean(model: nn.Module, batches: Batches, steps: int = STEPS, step_size: float = EPS / 4) -> None:
    optimizer = _sgd(model)
    for x, y in batches:
        model.eval()
        low, high = (x - EPS).clamp_(min=0.0), (x + EPS).clamp_(max=1.0)
        adv = _start(x)
        for _ in range(steps):
            adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
            adv = adv.detach().add_(grad.sign_(), alpha=step_size)
            torch.minimum(torch.maximum(adv, low, out=adv), high, out=adv)
        model.train()
        loss = F.cross_entropy(model(adv), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


WAYS: dict[str, Epoch] = {"ours": ours, "papers": papers, "lean": lean, "dynamic": dynamically}


def images(count: int, folder: str | None) -> Batches:
    """MNIST where it is, else noise of its size."""
    try:
        found = data.load("mnist", "train", folder=folder, limit=count)
        x, y = found.images, found.labels
    except FileNotFoundError:
        x, y = torch.rand(count, 1, 28, 28), torch.randint(0, 10, (count,))
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def measure(batches: Batches, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    start = models.mnist_cnn()
    # at random weights nothing is close to a kink, where rounding decides the sign of a gradient
    ends = {name: _trained(WAYS[name], start, batches) for name in ("ours", "papers", "lean")}
    apart = {name: _apart(ends["ours"], ends[name]) for name in ("papers", "lean")}
    for _ in range(2):  # away from the random weights, where gradients are small
        fr.training.train(start, batches, adversarial.FGSMRS(EPS), epochs=1, optimizer=_sgd(start))
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    moves = 0.0
    for k in range(rounds + 1):  # the first round warms up
        for name, epoch in WAYS.items():
            model = copy.deepcopy(start)
            torch.manual_seed(1)
            began = time.perf_counter()
            found = epoch(model, batches)
            if k:
                seconds[name].append(time.perf_counter() - began)
            moves = float(found) if name == "dynamic" else moves
    ratio = {
        name: statistics.median(b / a for a, b in zip(seconds["ours"], s, strict=True)) for name, s in seconds.items()
    }
    return {
        "seconds": {name: statistics.median(s) for name, s in seconds.items()}, "ratio": ratio,
        "weights apart": apart, "passes of dynamic": (min(moves + 1, STEPS) + 1) / (STEPS + 1),
    }  # fmt: skip


def _trained(epoch: Epoch, start: nn.Module, batches: Batches) -> nn.Module:
    model = copy.deepcopy(start)
    torch.manual_seed(1)
    epoch(model, batches)
    return model


def _apart(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two trained models' weights, over the largest weight."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return max(float((p - q).detach().abs().max() / p.detach().abs().max()) for p, q in pairs)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1280, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--data", metavar="FOLDER", help="folder with mnist.npz (default: FASTROBUST_DATA)")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args(argv)
    found = measure(images(args.images, args.data), args.rounds)
    bars = {"papers": "at least 1.3", "lean": "at least 1.0", "dynamic": "the share of the passes"}
    print(f"epoch of PGD-{STEPS}, MNIST CNN, {args.images} images, batches of {BATCH}")
    for name, seconds in found["seconds"].items():
        print(f"{name:<10}{seconds:8.3f} s{found['ratio'][name]:8.2f}x ours   {bars.get(name, '')}")
    print(f"dynamic makes {found['passes of dynamic']:.2f} of the passes")
    print("weights apart from ours: " + ", ".join(f"{k} {v:.1e}" for k, v in found["weights apart"].items()))
    TableFile(args.out, "epochs of adversarial training").add("pgd-10 epoch", found | {"images": args.images})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
