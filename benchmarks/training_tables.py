"""Headline comparisons of papers on robust training, in small: printed figures beside ours, with the spread over seeds.

    python -m benchmarks.training_tables [--table wang-1|thesis-4.2|thesis-4.6|thesis-4.7|gao ...]
                                         [--out benchmarks/results/training-tables.json]

    wang-1      Wang et al. 2019, table 1: unsecured, standard, curriculum and dynamic training, PGD-10
    thesis-4.2  Liu 2022, table 4.2: constant radius, cosine and linear warm-up at a large eps
    thesis-4.6  Liu 2022, table 4.6: ATTA, with reweighting, with adaptive targets
    thesis-4.7  Liu 2022, table 4.7: fine-tuning a robust model with additional data: vanilla, reweighted, KL, both
    gao         Gao et al. 2019, corollary 5.1, which has no printed figures: the least surrogate loss over the
    training, the
                distance from the start and from the linear model of two-layer nets of growing width, and the losses
                under other attacks

All but the last train narrow networks (CNN-4 of width 8, LeNet of width 4) on scikit-learn's digits or, with --set
mnist, on a part of MNIST (--data FOLDER or FASTROBUST_DATA), for far fewer steps than printed: what to look for is the
order of the rows. "passes" counts forward and backward passes of an example, an epoch: unlike seconds, a busy machine
does not change it. With --out a plot of each table is written beside the JSON. `python -m benchmarks.training_page`
makes the tables of the documentation of the file.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
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
from fastrobust.training import adversarial, dynamic, projected, reweight, schedules
from fastrobust.training.method import Batch, Method

from . import training_plots
from .table_file import TableFile

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How small: images, epochs and seeds."""

    source: str = "digits"
    train: int = 1347
    test: int = 450
    epochs: int = 20
    seeds: int = 3
    batch: int = 32
    eps: float = 0.2  # of all but thesis-4.2 and gao
    rate: float = 0.05
    folder: str | None = None


def images(sizes: Sizes, split: str) -> data.Images:
    return data.load(sizes.source, split, folder=sizes.folder, limit=sizes.train if split == "train" else sizes.test)


def share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


class Passes:
    """Counts, while it is open, how many examples go forward through a model and how many gradients come back."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count = model, 0

    def __enter__(self) -> Passes:
        self.hook = self.model.register_forward_hook(self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _forward(self, _model: nn.Module, _given: Any, out: Tensor) -> None:
        self.count += len(out)
        if out.requires_grad:
            out.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self.count += len(grad)


def train(
    model: nn.Module,
    batches: Any,
    method: Method,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    rate: schedules.Schedule,
) -> Figures:
    """Seconds, passes of an example in an epoch, and the mean of the method's own metrics."""
    with Passes(model) as passes:
        history = fr.training.train(model, batches, method, epochs=epochs, optimizer=optimizer, scheduler=rate)
    model.eval()
    examples = sum(len(batch[0]) for batch in batches)
    means = {name: mean(history, name) for name in history[-1]}
    return means | {"seconds": epochs * means["seconds"], "passes": passes.count / epochs / examples}


def loader(sizes: Sizes, seed: int, batch: int | None = None, part: slice = slice(None)) -> Any:
    found = images(sizes, "train")
    return fr.training.loader(found.images[part], found.labels[part], batch_size=batch or sizes.batch, seed=seed)


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
    """Accuracies in percent: SGD, momentum .9, weight decay 1e-4, / 10 at 2/5 and 4/5 of the epochs, the same for all.
    The default eps is .2: at the printed .3 standard training of so few steps often says one class for all images. Even
    so it has not learnt the clean images when it ends, which weak examples at the beginning mend (as in print for
    CIFAR-10)."""
    eps = sizes.eps
    torch.manual_seed(seed)
    test = images(sizes, "test")
    model = fr.nn.zoo.cnn4(10, tuple(test.images.shape[1:]), width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.rate, momentum=0.9, weight_decay=1e-4)
    method = WANG_METHODS[name](eps)
    rate = schedules.Piecewise((0.4, 0.8), sizes.rate)
    run = train(model, loader(sizes, seed), method, sizes.epochs, optimizer, rate)
    x, y = test.images, test.labels
    pgd = lambda k, **o: fr.attacks.pgd(model, x, y, eps=eps, steps=k, step_size=eps / 4, seed=seed, check=False, **o)
    found = (x, fr.attacks.fgsm(model, x, y, eps=eps, check=False), pgd(10), pgd(20), pgd(30, loss="margin"))
    figures = dict(zip(WANG_COLUMNS, (share(model, a, y) for a in found), strict=True))
    return figures | {"seconds": run["seconds"], "passes": run["passes"]}


# -- thesis, table 4.2 -------------------------------------------------------------------------------------------------
WARM_UP_EPS = {"mnist": 0.4, "digits": 0.3}
WARM_UP_COLUMNS = ("clean", "PGD-50", "APGD-CE", "APGD-DLR", "Square")
WARM_UP_PRINTED: dict[str, tuple[float, ...]] = {
    "constant": (1.56, 8.58, 15.18, 14.70, 19.58),
    "cosine": (1.08, 6.64, 14.36, 13.46, 16.78),
    "linear": (1.06, 6.69, 13.91, 13.17, 17.05),
}


def warm_up(name: str, sizes: Sizes, seed: int) -> Figures:
    """Errors in percent at eps .4 (MNIST) or .3 (digits): Adam 1e-3 (1e-4 printed, for 100 epochs of all images),
    PGD-10 with steps of eps / 4 in training."""
    eps = WARM_UP_EPS[sizes.source]
    torch.manual_seed(seed)
    test = images(sizes, "test")
    model = fr.nn.zoo.lenet(10, tuple(test.images.shape[1:]), width=4)
    radius: Any = eps if name == "constant" else schedules.WarmUp(eps, name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    run = train(model, loader(sizes, seed), adversarial.PGD(radius), sizes.epochs, optimizer, lambda _: 1e-3)
    x, y = test.images, test.labels
    one: dict[str, Any] = {"eps": eps, "seed": seed, "check": False}
    found = (
        x, fr.attacks.pgd(model, x, y, steps=50, step_size=0.01, **one), fr.attacks.apgd(model, x, y, steps=50, **one),
        fr.attacks.apgd(model, x, y, steps=50, loss="dlr", **one), fr.attacks.square(model, x, y, queries=500, **one),
    )  # fmt: skip
    errors = dict(zip(WARM_UP_COLUMNS, (100 - share(model, a, y) for a in found), strict=True))
    return errors | {"seconds": run["seconds"], "passes": run["passes"]}


# -- thesis, tables 4.6 and 4.7 ----------------------------------------------------------------------------------------
ROBUST_COLUMNS = ("clean", "PGD-20", "AutoAttack")
FAST_METHODS: dict[str, type[fr.training.ATTA]] = {
    "ATTA": fr.training.ATTA, "reweighting": reweight.Reweight, "adaptive targets": reweight.AdaptiveTargets,
}  # fmt: skip
FAST_PRINTED = {"ATTA": 44.48, "reweighting": 46.15, "adaptive targets": 51.17}  # WRN-34, CIFAR-10
TUNED: dict[str, dict[str, Any] | None] = {
    "no fine-tuning": None,
    "vanilla AT": {"kl_weight": 0.0, "reweight": False},
    "RW": {"kl_weight": 0.0, "reweight": True},
    "KL": {"kl_weight": 6.0, "reweight": False},
    "RW + KL": {"kl_weight": 6.0, "reweight": True},
}
TUNED_PRINTED = {
    "no fine-tuning": 67.77,
    "vanilla AT": 72.18,
    "RW": 72.72,
    "KL": 73.17,
    "RW + KL": 73.35,
}  # SVHN, 5 epochs


def robust(model: nn.Module, test: data.Images, eps: float, seed: int) -> Figures:
    """Accuracies in percent; AutoAttack is its fast version."""
    x, y = test.images, test.labels
    one: dict[str, Any] = {"eps": eps, "seed": seed, "check": False}
    found = (
        x, fr.attacks.pgd(model, x, y, steps=20, step_size=eps / 4, **one),
        fr.attacks.autoattack(model, x, y, version="fast", **one),
    )  # fmt: skip
    return dict(zip(ROBUST_COLUMNS, (share(model, a, y) for a in found), strict=True))


def fast(name: str, sizes: Sizes, seed: int) -> Figures:
    """Algorithm 4.1 with its own settings (38 epochs of 64 at the default size, SGD, / 10 at 30 and 36, eps / 2) but
    for the rate, .05 for .1, and without crops and mirror images, which digits do not bear; a warm-up of 5 epochs."""
    epochs = round(1.9 * sizes.epochs)
    torch.manual_seed(seed)
    test = images(sizes, "test")
    model = fr.nn.zoo.cnn4(10, tuple(test.images.shape[1:]), width=8)
    how = fr.training.recipe("atta", epochs=epochs, lr=sizes.rate)
    still: dict[str, Any] = {"shift": 0, "flip": False, "resets": (), "seed": seed}
    if name != "ATTA":
        still["warm_up"] = round(epochs * 5 / 38)
    method = FAST_METHODS[name](sizes.eps, **still)
    run = train(model, loader(sizes, seed, how.batch_size), method, epochs, how.make_optimizer(model), how.rate)
    return robust(model, test, sizes.eps, seed) | {"seconds": run["seconds"], "passes": run["passes"]}


@functools.lru_cache(maxsize=1)
def trained_on_half(sizes: Sizes, seed: int) -> nn.Module:
    """The model that is fine-tuned: PGD-10 training on the first half of the images."""
    torch.manual_seed(seed)
    model = fr.nn.zoo.cnn4(10, tuple(images(sizes, "test").images.shape[1:]), width=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=sizes.rate, momentum=0.9, weight_decay=5e-4)
    rate = schedules.Piecewise((0.5, 0.75), sizes.rate)
    half = loader(sizes, seed, part=slice(sizes.train // 2))
    train(model, half, adversarial.PGD(sizes.eps), sizes.epochs, optimizer, rate)
    return model


def tuned(name: str, sizes: Sizes, seed: int) -> Figures:
    """Five epochs (a quarter of the first training) through the other half of the images, with their labels as SVHN's
    extra images have them, half of each batch of the first; the rate is 1e-3 as printed."""
    test, options = images(sizes, "test"), TUNED[name]
    model = copy.deepcopy(trained_on_half(sizes, seed))
    run = {"seconds": 0.0, "passes": 0.0}
    if options is not None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        own, more = (loader(sizes, seed, part=slice(*ends)) for ends in ((sizes.train // 2,), (sizes.train // 2, None)))
        epochs = max(1, round(sizes.epochs / 4))
        method = adversarial.KLFinetune(sizes.eps, **options)
        run = train(model, adversarial.Mixed(own, more), method, epochs, optimizer, lambda _: 1e-3)
    return robust(model, test, sizes.eps, seed) | {"seconds": run["seconds"], "passes": run["passes"]}


# -- Gao et al. 2019 ---------------------------------------------------------------------------------------------------
GAO_WIDTHS = (16, 64, 256, 1024, 4096)
GAO_DELTA, GAO_RADIUS, GAO_EPS, GAO_STEPS = 0.1, 20.0, 0.05, 1000
GAO_COLUMNS = ("least loss", "distance", "gap", "one step", "PGD-10", "PGD-50x3")


def gao(width: str, sizes: Sizes, seed: int) -> Figures:
    """24 digits of two classes on the sphere; gradient descent without a projection (theorem 5.1) at the rate 4,
    PGD-5."""
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
    with Passes(net) as passes:
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
    return near | losses | {"seconds": seconds, "passes": passes.count / GAO_STEPS / len(x)}


@dataclasses.dataclass(frozen=True)
class Table:
    about: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    printed: dict[str, tuple[float, ...]]
    run: Callable[[str, Sizes, int], Figures]
    digits: int = 2


TABLES = {
    "wang-1": Table(
        "Wang et al. 2019, table 1 (MNIST): accuracy, %", WANG_COLUMNS, tuple(WANG_PRINTED), WANG_PRINTED, wang
    ),
    "thesis-4.2": Table(
        "Liu 2022, table 4.2 (MNIST LeNet): error, %", WARM_UP_COLUMNS, tuple(WARM_UP_PRINTED), WARM_UP_PRINTED, warm_up
    ),
    "thesis-4.6": Table(
        "Liu 2022, table 4.6 (CIFAR-10, WRN-34): accuracy, %; printed for AutoAttack alone",
        ROBUST_COLUMNS,
        tuple(FAST_METHODS),
        {k: (math.nan, math.nan, v) for k, v in FAST_PRINTED.items()},
        fast,
    ),
    "thesis-4.7": Table(
        "Liu 2022, table 4.7 (SVHN, ResNet-18, 5 epochs): accuracy, %; printed for AutoAttack alone",
        ROBUST_COLUMNS,
        tuple(TUNED),
        {k: (math.nan, math.nan, v) for k, v in TUNED_PRINTED.items()},
        tuned,
    ),
    "gao": Table(
        f"Gao et al. 2019, section 5, delta = {GAO_DELTA}: least surrogate loss (goal: eps = {GAO_EPS}), ||W - W_0|| "
        "/ R for "
        f"R = {GAO_RADIUS:g}, largest gap to the linear model, loss under other attacks; by width",
        GAO_COLUMNS,
        tuple(map(str, GAO_WIDTHS)),
        {},
        gao,
        3,
    ),
}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the sample."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def make(name: str, sizes: Sizes, file: TableFile) -> None:
    table = TABLES[name]
    print(f"{table.about}; mean and standard deviation of {sizes.seeds} seeds")
    print(f"{'':<18}" + "".join(f"{c:>16}" for c in (*table.columns, "passes", "seconds")))
    runs_of: dict[str, list[Figures]] = {row: [] for row in table.rows}
    for seed in tqdm(range(sizes.seeds), desc=name, leave=False):  # what rows of one seed share is made once
        for row in table.rows:
            runs_of[row].append(table.run(row, sizes, seed))
    for row, runs in runs_of.items():
        found = {key: spread([run[key] for run in runs]) for key in runs[0]}
        cells = (f"{found[c][0]:.{table.digits}f} ({found[c][1]:.{table.digits}f})" for c in table.columns)
        print(f"{row:<18}" + "".join(f"{c:>16}" for c in cells), end="")
        print(f"{found['passes'][0]:>16.1f}{found['seconds'][0]:>16.1f}", flush=True)
        printed = table.printed.get(row)
        if printed:
            print(f"{'  printed':<18}" + "".join(f"{'' if math.isnan(v) else f'{v:.2f}':>16}" for v in printed))
        file.add(f"{name} {row}", {
            "table": name, "row": row, "about": table.about, "sizes": dataclasses.asdict(sizes) | {"folder": None},
            "printed": {c: v for c, v in zip(table.columns, printed, strict=True) if v == v} if printed else None,
            "ours": {key: {"mean": centre, "deviation": sd} for key, (centre, sd) in found.items()}, "runs": runs,
        })  # fmt: skip


SETS = {"digits": (1347, 450), "mnist": (3000, 500)}  # training and test images


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Sizes()
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES), help="default: all")
    parser.add_argument("--set", choices=SETS, default=default.source, help="what is trained on (default: %(default)s)")
    parser.add_argument("--data", metavar="FOLDER", help="folder with mnist.npz (default: FASTROBUST_DATA)")
    for name, help in (("train", "training images"), ("test", "test images")):
        parser.add_argument(f"--{name}", type=int, help=f"{help} (default: by set)")
    for name in ("epochs", "seeds", "batch"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="(default: %(default)s)")
    for name, printed in (
        ("eps", "wang-1 prints .3"),
        ("rate", "of wang-1 (.01 printed), 4.6 (.1) and 4.7's first training"),
    ):
        parser.add_argument(
            f"--{name}", type=float, default=getattr(default, name), help=f"{printed} (default: %(default)s)"
        )
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update; plots are written beside it")
    args = parser.parse_args(argv)
    train, test = (b if a is None else a for a, b in zip((args.train, args.test), SETS[args.set], strict=True))
    sizes = Sizes(args.set, train, test, args.epochs, args.seeds, args.batch, args.eps, args.rate, args.data)
    if set(args.table) != {"gao"}:
        try:
            images(sizes, "test")
        except FileNotFoundError as error:
            parser.error(f"--data: {error}")
    file = TableFile(args.out, "headline comparisons of robust training, in small; spread over seeds")
    for name in args.table:
        make(name, sizes, file)
        if args.out is not None:
            print("written: " + training_plots.save(file.content["rows"], name, args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
