"""Table 1 of Wang et al., On the Convergence and Robustness of Adversarial Training (ICML 2019), for MNIST: accuracy on
clean images and under FGSM, PGD-10, PGD-20 and C&W-inf, of a plainly trained network and of one trained by PGD. Not a
timing suite.

    python -m benchmarks.attack_table --data FOLDER [--models plain pgd] [--images N] [--out FILE.json]

The networks are trained here, in minutes and not for the paper's 50 epochs, on the paper's architecture (two
convolutions with BatchNorm and max-pooling, two dense layers; its widths are not printed): printed figures stand beside
ours for their pattern, not to the digit. Attacks are the paper's: l-inf, eps 0.3, steps of eps / 4 from a random start;
C&W-inf is 30 such steps on the margin loss. `--dataset digits` runs on scikit-learn's digits, which need no folder.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fastrobust as fr
from fastrobust import data

from .table_file import TableFile

ABOUT = "Wang et al. 2019, table 1, MNIST: accuracy in percent, of networks trained here"
COLUMNS = ("Clean", "FGSM", "PGD-10", "PGD-20", "C&W-inf")
# Rows of the paper by the name of ours; its Curriculum and Dynamic are other ways of training by PGD
PRINTED = {
    "plain": ("Unsecured", (99.20, 14.04, 0.0, 0.0, 0.0)),
    "pgd": ("Standard", (97.61, 94.71, 91.21, 90.62, 91.03)),
}
EPS = 0.3
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "Clean": lambda model, x, y, **_: x,
    "FGSM": lambda model, x, y, **o: fr.attacks.fgsm(model, x, y, eps=EPS),
    "PGD-10": lambda model, x, y, **o: fr.attacks.pgd(model, x, y, eps=EPS, steps=10, step_size=EPS / 4, **o),
    "PGD-20": lambda model, x, y, **o: fr.attacks.pgd(model, x, y, eps=EPS, steps=20, step_size=EPS / 4, **o),
    "C&W-inf": lambda model, x, y, **o: fr.attacks.cw_inf(model, x, y, eps=EPS, step_size=EPS / 4, **o),
}


def network(shape: torch.Size, classes: int = 10, width: int = 8) -> nn.Sequential:
    """Two convolutions, each followed by BatchNorm, ReLU and max-pooling, and two dense layers."""
    side = shape[-1] // 4
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 5, padding=2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 5, padding=2), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * side * side, 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, adversarial: bool, epochs: int, seed: int, name: str) -> list[float]:
    """SGD with the paper's momentum and decay, and one cycle of the learning rate in place of its 50 epochs; PGD-10
    with steps of eps / 4 (Madry et al. 2018). The radius grows over the first third: at 0.3 from the start a network
    this young learns nothing but the classes' shares. Returns the loss of each epoch."""
    rng = torch.Generator().manual_seed(seed)
    batch = 128
    steps = math.ceil(len(x) / batch) * epochs
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=max(steps, 2), pct_start=0.3)
    history, done = [], 0
    with tqdm(total=steps, desc=f"training {name}", unit="step", leave=False, disable=None) as bar:
        for _ in range(epochs):
            total = 0.0
            for rows in torch.randperm(len(x), generator=rng).split(batch):
                images, labels = x[rows], y[rows]
                if adversarial:
                    eps = EPS * min(1.0, 3 * (done + 1) / steps)
                    images = fr.attacks.pgd(
                        model, images, labels, eps=eps, steps=10, step_size=eps / 4, seed=seed + done, check=False
                    )
                model.train()
                loss = F.cross_entropy(model(images), labels)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # a few steps at a high rate may not run away
                optimiser.step()
                cycle.step()
                total, done = total + loss.item() * len(rows), done + 1
                bar.update()
            history.append(total / len(x))
    model.eval()
    return history


def accuracies(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, float]:
    """In percent; the verdict on each image is the model's own on the image that the attack handed back."""
    found = {}
    for name, attack in tqdm(ATTACKS.items(), desc="attacks", leave=False, disable=None):
        right = 0
        for first in range(0, len(x), 500):
            part, labels = x[first : first + 500], y[first : first + 500]
            options = {} if name in ("Clean", "FGSM") else {"seed": seed, "first_example": first}
            adv = attack(model, part, labels, **options)
            with torch.no_grad():
                right += int((model(adv).argmax(1) == labels).sum())
        found[name] = 100 * right / len(x)
    return found


def row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains a network, attacks it, prints our line and the paper's, and gives what is kept."""
    training = data.load(args.dataset, "train", folder=args.data, limit=args.train_images)
    test = data.load(args.dataset, "test", folder=args.data, limit=args.images)
    torch.manual_seed(args.seed)
    model = network(training.images.shape[1:])
    start = time.perf_counter()
    losses = train(model, training.images, training.labels, name == "pgd", args.epochs[name], args.seed, name)
    trained, start = time.perf_counter() - start, time.perf_counter()
    got = accuracies(model, test.images, test.labels, args.seed)
    attacked, n = time.perf_counter() - start, len(test.labels)
    printed_name, printed = PRINTED[name]
    line = lambda label, values, end="": print(f"{label:<24}" + "".join(f"{v:9.2f}" for v in values) + end, flush=True)
    line(name, got.values(), f"{n:8d}{trained:9.1f}{attacked:9.1f}")
    errors = {c: 100 * math.sqrt(v / 100 * (1 - v / 100) / n) for c, v in got.items()}
    if n < 10_000:
        line("  standard error", errors.values())
    if args.dataset == "mnist":
        line(f"  printed ({printed_name})", printed)
    return {
        "table": "Wang et al. 2019, 1", "dataset": args.dataset, "eps": EPS, "step_size": EPS / 4, "seed": args.seed,
        "images": n, "train_images": len(training.labels), "epochs": args.epochs[name], "losses": losses,
        "printed": dict(zip(COLUMNS, printed, strict=True)) if args.dataset == "mnist" else None,
        "printed_name": printed_name, "ours": got, "standard_error": errors, "train_seconds": round(trained, 1),
        "attack_seconds": round(attacked, 1),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack_table", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--dataset", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--models", nargs="+", choices=tuple(PRINTED), default=list(PRINTED))
    parser.add_argument("--images", type=int, default=2000, help="test images (default: 2000; the paper: 10000)")
    parser.add_argument("--train-images", type=int, default=30_000, help="of the training set (default: 30000)")
    parser.add_argument("--epochs", type=int, default=None, help="of each network (default: 2 plain, 3 by PGD)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="keep the rows in this file")
    args = parser.parse_args(argv)
    for name in ("images", "train_images", "epochs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    args.epochs = dict.fromkeys(PRINTED, args.epochs or 2)
    table = TableFile(args.out, ABOUT)
    print(
        f"{'table 1, ' + args.dataset:<24}"
        + "".join(f"{c:>9}" for c in COLUMNS)
        + f"{'images':>8}{'train s':>9}{'attack s':>9}"
    )
    for name in args.models:
        table.add(f"{args.dataset} {name}", row(name, args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
