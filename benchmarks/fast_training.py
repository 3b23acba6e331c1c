"""Fast adversarial training: robust accuracy and seconds of each method (thesis, table 5.11, in small), and what ATAS
costs.

    python -m benchmarks.fast_training [--data digits|mnist|cifar10] [--images N] [--epochs E] [--seeds S] [--out FOLDER]
    python -m benchmarks.fast_training --costs [--images N] [--out FOLDER]

The first trains a small network by every method, with as many seeds as asked for, attacks it with PGD-50 and the fast
AutoAttack, and writes a table with the printed figures beside, one JSON and a plot of robust accuracy over seconds. The
second times an epoch of ATAS on the MNIST network beside the passes that it cannot do without, and the store's part of
it; nothing else should run then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import data as images_of
from fastrobust.training import registry
from fastrobust.training.augment import ShiftFlip

from . import metadata

# thesis, table 5.11, ResNet-18 on CIFAR-10: clean, PGD-10, PGD-50, AutoAttack
PRINTED = {
    "pgd": (80.13, 50.59, 48.94, 45.97),
    "fgsm-rs": (83.99, 48.99, 46.36, 42.95),
    "atta": (82.16, 47.47, 45.32, 42.51),
    "atas": (81.22, 50.03, 48.18, 45.38),
}
METHODS = ("pgd", "fgsm-rs", "n-fgsm", "free", "atta", "atas", "atas*1.5")  # *: times as many epochs


class Task(NamedTuple):
    """What a data set is trained with."""

    eps: float
    width: int
    shift: int
    flip: bool
    lr: float = 0.05


TASKS = {
    "digits": Task(0.2, 16, 0, False),
    "mnist": Task(0.3, 16, 0, False, 0.02),
    "cifar10": Task(8 / 255, 32, 4, True),
}


def network(images: Tensor, width: int, seed: int) -> nn.Module:
    """Two convolutions with batch norm and pooling, two dense layers (CNN-4 of Wang et al. 2019)."""
    torch.manual_seed(seed)
    channels, size = images.shape[1], images.shape[2]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def mnist_network() -> nn.Module:
    """The CNN of the thesis' chapter 3."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def make(name: str, task: Task, epochs: int) -> Any:
    """The method with its paper's settings, its epochs scaled to ours."""
    options: dict[str, Any] = {}
    if name in ("atta", "atas"):
        options = {"shift": task.shift, "flip": task.flip}
    moved = task.shift > 0 or task.flip  # images that stay have their perturbations drawn once, as ATTA's of MNIST
    if name == "atta":
        options["resets"] = tuple(epochs * k // 38 for k in (10, 20, 30)) if moved else ()
    if name == "atas":
        options |= {"warm_up": round(epochs / 6), "resets": (epochs // 3, 2 * epochs // 3) if moved else ()}
    return registry.make(name, eps=task.eps, **options)


def train(name: str, task: Task, data: Any, epochs: int, batch: int, seed: int) -> tuple[nn.Module, float]:
    """(the model, seconds of training)."""
    model = network(data.images, task.width, seed)
    passes = max(1, epochs // 3) if name == "free" else epochs  # 8 replays a batch: a third of the epochs (5.2.4)
    change = ShiftFlip(task.shift, task.flip, seed) if name not in ("atta", "atas") else None
    loader = fr.training.loader(data.images, data.labels, batch, seed=seed, drop_last=True, augment=change)
    optimizer = torch.optim.SGD(model.parameters(), lr=task.lr, momentum=0.9, weight_decay=5e-4)
    milestones = [max(1, round(passes * share)) for share in (24 / 30, 28 / 30)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    method = make(name, task, epochs)
    records = fr.training.train(model, loader, method, epochs=passes, optimizer=optimizer, scheduler=schedule)
    return model.eval(), sum(record["seconds"] for record in records)


def judge(model: nn.Module, data: Any, eps: float) -> dict[str, float]:
    x, y = data.images, data.labels
    right = lambda z: float((model(z).argmax(1) == y).double().mean()) * 100
    with torch.no_grad():
        clean = right(x)
    found = {"clean": clean}
    for name, adv in (
        ("pgd-50", fr.attacks.pgd(model, x, y, eps=eps, steps=50, step_size=eps / 4, seed=0)),
        ("autoattack-fast", fr.attacks.autoattack(model, x, y, eps=eps, version="fast")),
    ):
        with torch.no_grad():
            found[name] = right(adv)
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    task = TASKS[args.data]
    data = images_of.load(args.data, "train", limit=args.images)
    test = images_of.load(args.data, "test", limit=args.test_images)
    rows: dict[str, list[dict[str, float]]] = {}
    report: dict[str, Any] = {"data": args.data, "eps": task.eps, "epochs": args.epochs, "rows": rows, "missing": []}
    for name in args.methods:
        method, _, times = name.partition("*")
        if method not in registry.METHODS:
            report["missing"].append(name)
            continue
        epochs = round(args.epochs * float(times or 1))
        for seed in range(args.seeds):
            model, seconds = train(method, task, data, epochs, args.batch, seed)
            rows.setdefault(name, []).append({"seed": seed, "seconds": seconds, **judge(model, test, task.eps)})
            print(name, rows[name][-1], flush=True)
    return report


def spread(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):6.2f} ({low:.2f} to {high:.2f})"


def table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['data']}, eps {report['eps']:.4g}, {report['epochs']} epochs; mean (least to most) over the seeds; "
        "printed: "
        "table 5.11, ResNet-18 on CIFAR-10",
        f"{'method':10s} {'clean %':24s} {'PGD-50 %':24s} {'AutoAttack fast %':24s} {'seconds':24s} printed PGD-50 / "
        "AA",
    ]
    for name, runs in report["rows"].items():
        cells = [spread([r[key] for r in runs]) for key in ("clean", "pgd-50", "autoattack-fast", "seconds")]
        printed = f"{PRINTED[name][2]} / {PRINTED[name][3]}" if name in PRINTED else "-"
        lines.append(f"{name:10s} " + " ".join(f"{cell:24s}" for cell in cells) + f" {printed}")
    mean = lambda name, key: statistics.mean(r[key] for r in report["rows"][name])
    for name in ("atas", "atas*1.5"):
        if not {name, "pgd"} <= report["rows"].keys():
            continue
        gap = mean("pgd", "autoattack-fast") - mean(name, "autoattack-fast")
        share = mean(name, "seconds") / mean("pgd", "seconds")
        lines.append(f"{name}: {gap:+.2f} points below PGD-10 (bar: 2) in {share:.2f} of its time (bar: 0.33)")
    if report["missing"]:
        lines.append(f"not in this build: {', '.join(report['missing'])}")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, runs in report["rows"].items():
        axes.scatter([r["seconds"] for r in runs], [r["autoattack-fast"] for r in runs], label=name)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("robust accuracy (%), AutoAttack fast")
    axes.set_title(f"{report['data']}, eps {report['eps']:.3g}, {report['epochs']} epochs", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- costs ----


def in_turns(works: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every round."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def costs(args: argparse.Namespace) -> dict[str, Any]:
    """An epoch of ATAS, its passes alone, and its store alone; for images that stay and for crops and mirror images."""
    data = images_of.load("mnist", "train", limit=args.images)
    report: dict[str, Any] = {"data": "mnist", "images": len(data.labels), "batch": args.batch}
    for moved in (False, True):
        torch.manual_seed(0)
        model = mnist_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        loader = fr.training.loader(data.images, data.labels, args.batch, drop_last=True)
        method = fr.training.ATAS(0.3, warm_up=0, resets=(), shift=2 if moved else 0, flip=moved)
        method.begin(model, len(data.labels), 1)

        def update(loss: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        def atas(loader: Any = loader, method: Any = method, model: nn.Module = model, update: Any = update) -> None:
            for x, y, index in loader:
                method.step(model, fr.training.Batch(x, y, index), update)

        def passes(learns: bool, loader: Any = loader, model: nn.Module = model, update: Any = update) -> None:
            for x, y, _ in loader:
                leaf = x.requires_grad_()
                (_,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
                loss = F.cross_entropy(model(x.detach()), y)
                if learns:
                    update(loss)
                else:
                    torch.autograd.grad(loss, list(model.parameters()))

        def store(loader: Any = loader, method: Any = method) -> None:
            for x, y, index in loader:
                move = method._augment.draw(fr.training.Batch(x, y, index))
                clean = move.apply(x)
                start = method.store.start(index, clean, 0.3, move=move)
                method.store.update(index, start, clean, move)

        def batches(loader: Any = loader) -> None:
            for _ in loader:
                pass

        works = {
            "atas": atas, "passes": lambda: passes(False), "passes and update": lambda: passes(True), "store": store,
            "loader": batches,
        }  # fmt: skip
        found = in_turns(works, args.rounds)
        found["atas / passes"] = (found["atas"] - found["loader"]) / (found["passes"] - found["loader"])
        found["atas / passes and update"] = (found["atas"] - found["loader"]) / (
            found["passes and update"] - found["loader"]
        )
        found["store / atas"] = (found["store"] - found["loader"]) / found["atas"]
        report["moved" if moved else "still"] = found
        print("crops and mirror images" if moved else "images that stay", json.dumps(found, indent=1), flush=True)
    print("bars: atas / passes at most 1.25; store / atas at most 0.05")
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(TASKS), default="digits")
    parser.add_argument("--images", type=int, default=None, help="training images (default: all; 6000 of MNIST)")
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--costs", action="store_true", help="time an epoch of ATAS instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    if args.images is None and (args.costs or args.data == "mnist"):
        args.images = 6000
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"cpu": metadata.cpu_name(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    report = {**about, **(costs(args) if args.costs else compare(args))}
    name = "fast-training-costs" if args.costs else f"fast-training-{args.data}"
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    if not args.costs:
        print(table(report))
        plot(report, args.out / f"{name}.png")


if __name__ == "__main__":
    main()
