"""Headline comparisons of papers on robust training, in small: printed figures beside ours, with the spread over seeds.

    python -m benchmarks.training_tables [--table wang-1|thesis-4.2|gao ...] [--out benchmarks/results/training.json]

    wang-1      Wang et al. 2019, table 1: unsecured, standard, curriculum and dynamic training, PGD-10
    thesis-4.2  Liu 2022, table 4.2: constant radius, cosine and linear warm-up at a large eps = 0.4
    gao         Gao et al. 2019, corollary 5.1, which has no printed figures: the least surrogate loss over the training, the
                distance from the start and from the linear model of two-layer nets of growing width, and the losses
                under other attacks

The first two train on a part of MNIST (--data FOLDER or FASTROBUST_DATA) or, with --set digits, on scikit-learn's digits,
with narrow networks (CNN-4 of width 8, LeNet of width 4 for 16), for far fewer steps than printed: what to look for is the order of the rows. Not a timing suite: the
seconds are those of one training. `python -m benchmarks.training_page` makes the tables of the documentation of the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrobust as fr
from fastrobust import data
from fastrobust.training import adversarial, dynamic, projected, schedules
from fastrobust.training.method import Batch, Method

from .table_file import TableFile

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How small: images, epochs and seeds."""

    source: str = "mnist"
    train: int = 3000
    test: int = 500
    epochs: int = 20
    seeds: int = 3
    batch: int = 32
    eps: float = 0.2  # of wang-1
    rate: float = 0.05
    folder: str | None = None


def images(sizes: Sizes, split: str) -> data.Images:
    return data.load(sizes.source, split, folder=sizes.folder, limit=sizes.train if split == "train" else sizes.test)


def share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


def train(
    model: nn.Module,
    sizes: Sizes,
    seed: int,
    method: Method,
    optimizer: torch.optim.Optimizer,
    rate: schedules.Schedule,
) -> list[Figures]:
    train_set = images(sizes, "train")
    batches = fr.training.loader(train_set.images, train_set.labels, batch_size=sizes.batch, seed=seed)
    history = fr.training.train(model, batches, method, epochs=sizes.epochs, optimizer=optimizer, scheduler=rate)
    model.eval()
    return history


def mean(history: list[Figures], name: str, default: float = 0.0) -> float:
    return statistics.fmean(record.get(name, default) for record in history)


# -- Wang et al. 2019, table 1 -----------------------------------------------------------------------------------------
WANG_COLUMNS = ("clean", "FGSM", "PGD-10", "PGD-20", "CW-inf")
WANG_PRINTED: dict[str, tuple[float, ...]] = {
    "unsecured": (99.20, 14.04, 0.0, 0.0, 0.0),
    "standard": (97.61, 94.71, 91.21, 90.62, 91.03),
    "curriculum": (98.62, 95.51, 91.24, 90.65, 91.12),
    "dynamic": (97.96, 95.34, 91.63, 91.27, 91.47),
}
WANG_METHODS: dict[str, Callable[[float], Method]] = {
    "unsecured": lambda eps: Method(),
    "standard": adversarial.PGD,
    "curriculum": adversarial.Curriculum,
    "dynamic": lambda eps: dynamic.DynamicAT(eps, control=0.8),
}


def wang(name: str, sizes: Sizes, seed: int) -> Figures:
    """Accuracies in percent: SGD, momentum .9, weight decay 1e-4, / 10 at 2/5 and 4/5 of the epochs. The default eps is .2:
    at the printed .3 standard training of so few steps often says one class for all images, as its figures then show."""
    eps = sizes.eps
    torch.manual_seed(seed)
    test = images(sizes, "test")
    model = fr.nn.zoo.cnn4(10, tuple(test.images.shape[1:]), width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.rate, momentum=0.9, weight_decay=1e-4)
    method = WANG_METHODS[name](eps)
    history = train(model, sizes, seed, method, optimizer, schedules.Piecewise((0.4, 0.8), sizes.rate))
    x, y = test.images, test.labels
    pgd = lambda k, **o: fr.attacks.pgd(model, x, y, eps=eps, steps=k, step_size=eps / 4, seed=seed, check=False, **o)
    found = (x, fr.attacks.fgsm(model, x, y, eps=eps, check=False), pgd(10), pgd(20), pgd(30, loss="margin"))
    figures = dict(zip(WANG_COLUMNS, (share(model, a, y) for a in found), strict=True))
    steps = mean(history, "attack_steps", getattr(method, "steps", 0))
    if isinstance(method, adversarial.Curriculum):
        steps = statistics.fmean(method.strength(Batch(x, y, None, e, sizes.epochs)) for e in range(sizes.epochs))
    return figures | {"seconds": sizes.epochs * mean(history, "seconds"), "attack steps": steps}


# -- thesis, table 4.2 -------------------------------------------------------------------------------------------------
WARM_UP_COLUMNS = ("clean", "PGD-50", "APGD-CE", "APGD-DLR", "Square")
WARM_UP_PRINTED: dict[str, tuple[float, ...]] = {
    "constant": (1.56, 8.58, 15.18, 14.70, 19.58),
    "cosine": (1.08, 6.64, 14.36, 13.46, 16.78),
    "linear": (1.06, 6.69, 13.91, 13.17, 17.05),
}


def warm_up(name: str, sizes: Sizes, seed: int) -> Figures:
    """Errors in percent: Adam 1e-3 (1e-4 printed, for 100 epochs of all images), PGD-10 with steps of eps / 4 in training."""
    eps = 0.4
    torch.manual_seed(seed)
    test = images(sizes, "test")
    model = fr.nn.zoo.lenet(10, tuple(test.images.shape[1:]), width=4)
    radius: Any = eps if name == "constant" else schedules.WarmUp(eps, name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = train(model, sizes, seed, adversarial.PGD(radius), optimizer, lambda _: 1e-3)
    x, y = test.images, test.labels
    one: dict[str, Any] = {"eps": eps, "seed": seed, "check": False}
    found = (
        x, fr.attacks.pgd(model, x, y, steps=50, step_size=0.01, **one), fr.attacks.apgd(model, x, y, steps=50, **one),
        fr.attacks.apgd(model, x, y, steps=50, loss="dlr", **one), fr.attacks.square(model, x, y, queries=500, **one),
    )  # fmt: skip
    errors = dict(zip(WARM_UP_COLUMNS, (100 - share(model, a, y) for a in found), strict=True))
    return errors | {"seconds": sizes.epochs * mean(history, "seconds")}


# -- Gao et al. 2019 ---------------------------------------------------------------------------------------------------
GAO_WIDTHS = (16, 64, 256, 1024, 4096)
GAO_DELTA, GAO_RADIUS, GAO_EPS, GAO_STEPS = 0.1, 20.0, 0.05, 1000
GAO_COLUMNS = ("least loss", "distance", "gap", "one step", "PGD-10", "PGD-50x3")


def gao(width: str, sizes: Sizes, seed: int) -> Figures:
    """24 digits of two classes on the sphere; gradient descent without a projection (theorem 5.1) at the rate 4, PGD-5."""
    digits = data.digits("train")
    rows = torch.cat([(digits.labels == k).nonzero()[:12, 0] for k in (3, 8)])
    x = projected.to_sphere(digits.images[rows].flatten(1))
    y = (digits.labels[rows] == 8).long()
    net = projected.TwoLayerNTK(x.shape[1], int(width), "tanh", seed=seed)
    begun = {n: p.detach().clone() for n, p in net.named_parameters()}
    method = projected.Projected(GAO_RADIUS, delta=GAO_DELTA, steps=5, joint=True, project=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=4.0)
    torch.manual_seed(seed)
    start = time.perf_counter()
    fr.training.train(net, [(x, y)], method, epochs=GAO_STEPS, optimizer=optimizer)
    seconds = time.perf_counter() - start
    batch = Batch(x, y)
    gap = projected.linearisation_gap(net, begun, x).max()
    found = {
        "one step": projected.Projected(delta=GAO_DELTA, steps=1, step_size=GAO_DELTA, random_start=False),
        "PGD-10": projected.Projected(delta=GAO_DELTA),
        "PGD-50x3": projected.Projected(delta=GAO_DELTA, steps=50, restarts=3, keep="best"),
    }
    losses = {k: float(m.loss(net, batch, m.perturb(net, batch)).value.detach()) for k, m in found.items()}
    near = {"least loss": method.least, "distance": method.distance(net), "gap": float(gap)}
    return near | losses | {"seconds": seconds}


@dataclasses.dataclass(frozen=True)
class Table:
    about: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    printed: dict[str, tuple[float, ...]]
    run: Callable[[str, Sizes, int], Figures]
    digits: int = 2


TABLES = {
    "wang-1": Table("Wang et al. 2019, table 1 (MNIST): accuracy, %", WANG_COLUMNS, tuple(WANG_PRINTED), WANG_PRINTED, wang),
    "thesis-4.2": Table(
        "Liu 2022, table 4.2 (MNIST LeNet): error, %", WARM_UP_COLUMNS, tuple(WARM_UP_PRINTED), WARM_UP_PRINTED, warm_up
    ),
    "gao": Table(
        f"Gao et al. 2019, section 5, delta = {GAO_DELTA}: least surrogate loss (goal: eps = {GAO_EPS}), ||W - W_0|| / R for "
        f"R = {GAO_RADIUS:g}, largest gap to the linear model, loss under other attacks; by width",
        GAO_COLUMNS, tuple(map(str, GAO_WIDTHS)), {}, gao, 3,
    ),
}  # fmt: skip


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the sample."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def make(name: str, sizes: Sizes, file: TableFile) -> None:
    table = TABLES[name]
    print(f"{table.about}; mean and standard deviation of {sizes.seeds} seeds")
    print(f"{'':<14}" + "".join(f"{c:>16}" for c in (*table.columns, "seconds")))
    for row in table.rows:
        runs = [table.run(row, sizes, seed) for seed in tqdm(range(sizes.seeds), desc=row, leave=False)]
        found = {key: spread([run[key] for run in runs]) for key in runs[0]}
        cells = (f"{found[c][0]:.{table.digits}f} ({found[c][1]:.{table.digits}f})" for c in table.columns)
        print(f"{row:<14}" + "".join(f"{c:>16}" for c in cells) + f"{found['seconds'][0]:>16.1f}", flush=True)
        printed = table.printed.get(row)
        if printed:
            print(f"{'  printed':<14}" + "".join(f"{v:>16.2f}" for v in printed))
        file.add(f"{name} {row}", {
            "table": name, "row": row, "about": table.about, "sizes": dataclasses.asdict(sizes) | {"folder": None},
            "printed": dict(zip(table.columns, printed, strict=True)) if printed else None,
            "ours": {key: {"mean": centre, "deviation": sd} for key, (centre, sd) in found.items()}, "runs": runs,
        })  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Sizes()
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES), help="default: all")
    parser.add_argument("--set", choices=("mnist", "digits"), default=default.source, help="what is trained on")
    parser.add_argument("--data", metavar="FOLDER", help="folder with mnist.npz (default: FASTROBUST_DATA)")
    for name in ("train", "test", "epochs", "seeds", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="(default: %(default)s)")
    parser.add_argument(
        "--eps", type=float, default=default.eps, help="of wang-1; .3 is printed (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=default.rate, help="of wang-1; .01 is printed (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args(argv)
    sizes = Sizes(args.set, args.train, args.test, args.epochs, args.seeds, args.batch, args.eps, args.rate, args.data)
    if set(args.table) != {"gao"}:
        try:
            images(sizes, "test")
        except FileNotFoundError as error:
            parser.error(f"--data: {error}")
    file = TableFile(args.out, "headline comparisons of robust training, in small; spread over seeds")
    for name in args.table:
        make(name, sizes, file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
