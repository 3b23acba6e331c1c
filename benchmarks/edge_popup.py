"""Edge-popup on MNIST or digits: pruning strategies and the last batch normalisation (thesis, tables 5.2 to 5.4 in
kind).

    python -m benchmarks.edge_popup [--data FOLDER] [--images N] [--epochs E] [--out FOLDER]
    python -m benchmarks.edge_popup --times [--images N] [--out FOLDER]

Trains a small network of untrained signs for each (r, gamma, LBN), attacks the test images with PGD, and writes one
JSON and a plot of the learning curves. Without a data folder it takes scikit-learn's digits. With --times it writes how
long an epoch takes beside the same training in ordinary torch (see dense_edge_popup.py) instead; nothing else should
run then.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastrobust as fr

from .dense_edge_popup import dense_model, train_epoch

Split = tuple[Tensor, Tensor]


def load(folder: str | None, images: int) -> tuple[str, Split, Split]:
    """(name, training images and labels, test images and labels), pixels in [0, 1]."""
    if folder:
        with np.load(pathlib.Path(folder) / "mnist.npz") as file:
            parts = [(file[f"{s}_images"][:n], file[f"{s}_labels"][:n]) for s, n in (("train", images), ("test", 500))]
        splits = [
            (torch.from_numpy(x).float().div(255).reshape(-1, 1, 28, 28), torch.from_numpy(y).long()) for x, y in parts
        ]
        return "mnist", splits[0], splits[1]
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy(digits.images).float().div(16)[:, None]
    y = torch.from_numpy(digits.target).long()
    return "digits", (x[:1297], y[:1297]), (x[1297:], y[1297:])


def robust_accuracy(model: nn.Module, split: Split, eps: float) -> float:
    x, y = split
    was = model.training
    frozen = fr.nn.freeze(model.eval())
    adversarial = fr.attacks.pgd(frozen, x, y, eps=eps, steps=10, seed=0)
    with torch.no_grad():
        right = (frozen(adversarial).argmax(1) == y).double().mean()
    model.train(was)
    return float(right)


def run(args: argparse.Namespace, train: Split, test: Split, rate: float, gamma: float, lbn: bool) -> dict[str, Any]:
    torch.manual_seed(args.seed)
    net = fr.nn.small_cnn(width=args.width, last_batch_norm=lbn)
    model = fr.nn.convert(net, rate, gamma)
    curve: list[float] = []

    def batches() -> list[Split]:
        order = torch.randperm(len(train[0]))
        return [(train[0][i], train[1][i]) for i in order.split(args.batch) if len(i) > 1]

    class Shuffled:
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(batches())

    start = time.perf_counter()
    records = fr.training.edge_popup(
        model, Shuffled(), epochs=args.epochs, eps=args.eps, steps=args.steps,
        on_epoch=lambda m, _: curve.append(robust_accuracy(m, test, args.eps)),
    )  # fmt: skip
    result = {
        "r": rate,
        "gamma": gamma,
        "last_batch_norm": lbn,
        "kept": sum(layer.keep for layer in fr.nn.masked_layers(model).values()),
        "robust_accuracy": curve,
        "training": records,
        "seconds": time.perf_counter() - start,
    }
    print(
        f"r {rate} gamma {gamma} LBN {lbn}: robust accuracy {100 * curve[-1]:.1f} %, best {100 * max(curve):.1f} %",
        flush=True,
    )
    return result


def times(args: argparse.Namespace, train: Split) -> list[dict[str, Any]]:
    """Seconds of one epoch for each rate: ours, torch as it is best written, torch as the authors wrote it."""
    rows = []
    batches = [b for b in zip(train[0].split(args.batch), train[1].split(args.batch), strict=True) if len(b[0]) > 1]
    for rate in args.rates:
        torch.manual_seed(args.seed)
        model = fr.nn.convert(fr.nn.small_cnn(width=args.width), rate, args.gammas[0])
        models = {"ours": model, "torch tuned": dense_model(model), "torch authors": dense_model(model)}

        def epoch(name: str, given: list[Split], models: dict[str, nn.Module] = models) -> None:
            if name == "ours":
                fr.training.edge_popup(models[name], given, epochs=1, eps=args.eps, steps=args.steps)
            else:
                train_epoch(models[name], given, args.eps, args.steps, name == "torch tuned")

        row: dict[str, Any] = {"r": rate, "gamma": args.gammas[0], "images": sum(len(b[0]) for b in batches)}
        for name in models:
            epoch(name, batches[:1])
        # In turns, so that a machine that slows down does so for all; the median of three.
        taken: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(3):
            for name in models:
                start = time.perf_counter()
                epoch(name, batches)
                taken[name].append(time.perf_counter() - start)
        row["seconds"] = {name: sorted(t)[1] for name, t in taken.items()}
        row["ratio"] = {name: t / row["seconds"]["ours"] for name, t in row["seconds"].items()}
        print(row, flush=True)
        rows.append(row)
    return rows


def plot(results: list[dict[str, Any]], title: str, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for r in results:
        style = "-" if r["last_batch_norm"] else "--"
        label = f"r {r['r']}, gamma {r['gamma']}{'' if r['last_batch_norm'] else ', no LBN'}"
        axes.plot(range(1, len(r["robust_accuracy"]) + 1), [100 * a for a in r["robust_accuracy"]], style, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("robust accuracy (%), PGD-10")
    axes.set_title(title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--images", type=int, default=2000, help="training images of MNIST")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.99])
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--times", action="store_true", help="time an epoch instead of training")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    args = parser.parse_args()
    name, train, test = load(args.data, args.images)
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "times")}
    about = {"data": name, "settings": settings, "torch": torch.__version__, "threads": torch.get_num_threads()}
    args.out.mkdir(parents=True, exist_ok=True)
    if args.times:
        report = {**about, "epochs": times(args, train)}
        (args.out / f"edge_popup_{name}_times.json").write_text(json.dumps(report, indent=1) + "\n")
        return
    results = []
    for rate in args.rates:
        for gamma in args.gammas:
            for lbn in (True, False) if gamma == args.gammas[0] else (True,):
                results.append(run(args, train, test, rate, gamma, lbn))
                # A long run that is broken off leaves what it has.
                report = {**about, "results": results}
                (args.out / f"edge_popup_{name}.json").write_text(json.dumps(report, indent=1) + "\n")
                plot(results, f"Edge-popup on {name}, eps {args.eps}", args.out / f"edge_popup_{name}.png")


if __name__ == "__main__":
    main()
