"""What `fastrobust analyse` runs of the training's topics: function(images, labels, seed) -> (arrays, draw(path))."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..attacks._modes import undisturbed
from ..nn.masked import masked_layers
from ..nn.zoo import lenet, thesis_cnn
from ..training import loader
from ..training.loop import train
from ..training.registry import make
from . import difficulty as hardness
from . import subnetwork as nets
from . import theory as facts

Arrays = dict[str, Any]
Found = tuple[Arrays, Callable[[Path], None]]
_EPS, _SMALL_EPS, _STEPS, _EPOCHS, _BATCH = 0.1, 0.03, 5, 20, 64
_NOISE = (4500, 9000)  # examples and inputs of theorem 4.6: with fewer it says nothing


def difficulty(images: Tensor, labels: Tensor, seed: int = 0) -> Found:
    """Difficulty under plain, FGSM and PGD training of two initialisations each, their D-distances (table 4.3, right),
    those between architectures and durations of PGD training (left), groups (figure 4.21), and training on the
    hardest, random and easiest third (figures 4.17, table 4.5)."""
    names = {"plain": make("plain"), "fgsm": make("pgd", eps=_EPS, steps=1), "pgd": make("pgd", eps=_EPS, steps=_STEPS)}
    tables, d, errors = {}, {}, {}
    for name, method in names.items():
        for run in range(2):
            recorder = hardness.Recorder(method)
            _trained(images, labels, recorder, seed + run)
            tables[name, run] = recorder.losses.numpy()
            d[name, run] = hardness.difficulty(recorder.losses)
            errors[name, run] = hardness.difficulty(recorder.errors)
    distance = np.array([[_between(d, a, b) for b in names] for a in names])
    means = hardness.group_means(tables["pgd", 0], hardness.groups(d["pgd", 0]))
    # at the smaller budget the hard third can be fitted, at the larger it cannot: the two give opposite orders
    small = make("pgd", eps=_SMALL_EPS, steps=_STEPS)
    recorder = hardness.Recorder(small)
    _trained(images, labels, recorder, seed)
    studies = [
        _subsets(images, labels, method, order, seed)
        for method, order in ((small, hardness.difficulty(recorder.losses)), (names["pgd"], d["pgd", 0]))
    ]
    kinds = {("CNN", _EPOCHS): d["pgd", 0]}
    for name, epochs in (("CNN", max(1, _EPOCHS // 2)), ("LeNet", _EPOCHS), ("LeNet", max(1, _EPOCHS // 2))):
        recorder = hardness.Recorder(names["pgd"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            other = lenet(int(labels.max()) + 1, _shape(images), width=4) if name == "LeNet" else None
        _trained(images, labels, recorder, seed + 1, epochs, other)
        kinds[name, epochs] = hardness.difficulty(recorder.losses)
    arrays = {
        "methods": np.array(list(names)),
        "d_distance": distance,
        "architectures": np.array([f"{name}, {epochs} epochs" for name, epochs in kinds]),
        "d_distance_architectures": np.array(
            [[hardness.d_distance(a, b) for a in kinds.values()] for b in kinds.values()]
        ),
        "difficulty": d["pgd", 0],
        "difficulty_by_error": errors["pgd", 0],
        "correlation": np.corrcoef(d["pgd", 0], errors["pgd", 0])[0, 1],
        "group_losses": means,
        "subsets": np.array(hardness.SUBSETS),
        "budgets": np.array([_SMALL_EPS, _EPS]),
        "robust_accuracy": np.stack([study[0] for study in studies]),
        "lipschitz": np.stack([study[1] for study in studies]),
    }

    def draw(path: Path) -> None:
        figure, (left, right) = _axes(2)
        hardness.plot_groups(left, means, [0, 3, 6, 9])
        hardness.plot_two(right, d["pgd", 0], errors["pgd", 0])
        figure.savefig(path)

    return arrays, draw


def _subsets(images: Tensor, labels: Tensor, method: Any, order: Any, seed: int) -> tuple[Any, Any]:
    """Robust accuracy (on the subset, on all images) and Lipschitz bound of training on each kind of third."""
    accuracy, bounds = [], []
    for which in hardness.SUBSETS:
        rows = torch.from_numpy(hardness.subset(order, labels, len(images) // 3, which, seed=seed))
        # a third of the examples wants three times the epochs for as many updates; twice that, for the hard ones
        model = _trained(images[rows], labels[rows], method, seed, 6 * _EPOCHS)
        accuracy.append([_robust(model, images[r], labels[r], method.eps) for r in (rows, slice(None))])
        bounds.append(hardness.lipschitz_bound(model, tuple(images.shape[1:])).bound)
    return np.array(accuracy), np.array(bounds)


def _between(d: dict[tuple[str, int], Any], a: str, b: str) -> float:
    """Between trainings from different initialisations."""
    return (hardness.d_distance(d[a, 0], d[b, 1]) + hardness.d_distance(d[a, 1], d[b, 0])) / 2


def _robust(model: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: Any = "Linf") -> float:
    found = images
    if eps:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the random start
            found = pgd(model, images, labels, eps=eps, steps=_STEPS, norm=norm)
    with undisturbed(model, "eval"), torch.no_grad():
        return float((model(found).argmax(1) == labels).float().mean())


def _trained(
    images: Tensor, labels: Tensor, method: Any, seed: int, epochs: int = _EPOCHS, model: nn.Module | None = None,
    callbacks: Any = (),
) -> nn.Module:  # fmt: skip
    """A small CNN; the caller's random numbers go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = thesis_cnn(int(labels.max()) + 1, _shape(images), width=8) if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        rates = [0.05 * 0.1 ** ((e >= epochs // 2) + (e >= epochs * 3 // 4)) for e in range(epochs)]
        batches = loader(images, labels, _BATCH, seed=seed)
        train(model, batches, method, epochs=epochs, optimizer=optimizer, scheduler=rates, callbacks=callbacks)
    return model


def _shape(images: Tensor) -> tuple[int, int, int]:
    if images.dim() != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (N, C, H, W)")
    return (images.shape[1], images.shape[2], images.shape[3])


def _axes(count: int) -> Any:
    from matplotlib.figure import Figure  # an optional extra; needs no display

    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    return figure, figure.subplots(1, count)


def subnetwork(images: Tensor, labels: Tensor, seed: int = 0) -> Found:
    """Subnetworks of a random CNN by PGD edge-popup: robust accuracy over pruning rate x gamma (table 5.2) on a
    quarter of the images kept for it, what the last row's best keeps (figures 5.2 to 5.4), operations (table 5.1),
    and the width of the dense network with as many weights (table 5.6)."""
    shape, classes = _shape(images), int(labels.max()) + 1
    held = torch.arange(len(images)) % 4 == 0
    rates, gammas = (0.5, 0.9, 0.97), (0.0, 0.1, 0.5, 1.0)
    kept: list[nn.Module] = []

    def judge(model: nn.Module) -> float:
        kept.append(model)
        return _robust(model, images[held], labels[held], _EPS)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = _base(classes, shape, 16)
    method = make("edge-popup", eps=_EPS, steps=_STEPS)
    table = nets.study(
        base, loader(images[~held], labels[~held], _BATCH, seed=seed), nets.grid(rates, gammas), judge, epochs=8,
        method=method, seed=seed,
    ).reshape(len(rates), len(gammas))  # fmt: skip
    best = kept[(len(rates) - 1) * len(gammas) + int(table[-1].argmax())]
    counts, layers = nets.kept_weights(best), masked_layers(best)
    first, second = list(layers)[1:3]
    chance = nets.random_channels(layers[first].scores.shape, layers[first].keep, seed=seed)
    total = sum(c.kept for c in counts.values())
    width = nets.equal_width(lambda w: _base(classes, shape, w), total)
    dense = _trained(
        images[~held], labels[~held], make("pgd", eps=_EPS, steps=_STEPS), seed, 8, _base(classes, shape, width)
    )
    full, binary = (np.array(nets.flops(best, shape, binary=b)) for b in (False, True))
    arrays = {
        "rates": np.array(rates),
        "gammas": np.array(gammas),
        "robust_accuracy": table,
        "layers": np.array(list(counts)),
        "kept": np.array([(c.kept, c.total) for c in counts.values()]),
        "outputs_sorted": np.sort(counts[first].outputs)[::-1],
        "outputs_random": chance[0],
        "aligned": np.array(nets.aligned(layers[first], layers[second])),
        "flops_saved": 1 - binary / full,
        "equal_width": width,
        "equal_width_robust_accuracy": _robust(dense, images[held], labels[held], _EPS),
    }

    def draw(path: Path) -> None:
        figure, (left, middle, right) = _axes(3)
        for rate, row in zip(rates, table, strict=True):
            left.plot(gammas, row, marker="o", label=f"r = {rate}")
        left.set_xlabel("gamma")
        left.set_ylabel("robust accuracy")
        left.legend()
        nets.plot_channels(middle, counts[first].outputs, chance[0])
        nets.plot_pattern(right, layers[first])
        figure.savefig(path)

    return arrays, draw


def theory(images: Tensor, labels: Tensor, seed: int = 0) -> Found:
    """Margins of the statements of :mod:`fastrobust.analysis.theory` on the images of two classes, and the way of
    adversarial logistic regression to the max-margin direction (theorem 4.4)."""
    random = np.random.default_rng(seed)
    low, high = (int(c) for c in labels.unique()[:2])
    rows = torch.cat([(labels == c).nonzero()[:30, 0] for c in (low, high)])
    flat = images[rows].flatten(1).double().cpu().numpy()
    x, y = flat - flat.mean(axis=0), np.where(labels[rows].cpu().numpy() == low, 1.0, -1.0)
    w = facts.max_margin(x, y)
    unit = w / np.linalg.norm(w)
    margin = 1 / float(np.linalg.norm(w))
    other = random.standard_normal((2, len(w))) / len(w) ** 0.5
    many = random.standard_normal((10, len(w))) / len(w) ** 0.5
    modes, shares = (2.0, 3.0, 4.0), (0.3, 0.3, 0.4)
    measured, exact, deviation = facts.lemma_4_3(unit, unit, 1.5, 0.5, seed=seed)
    pull = np.exp(-np.logaddexp(0, y * (x @ w)))
    rare, mean = facts.theorem_4_3(x, y, 2 * margin, steps=500)
    reach = random.random((2, 8))
    greedy = [
        facts.theorem_3_1(a, 0.3 * np.abs(a).min(), -reach[0], reach[1], p=p)[2].margin
        for a in random.standard_normal((20, 8))
        for p in (2.0, np.inf)
    ]
    margins = {
        "theorem 3.1": min(greedy),
        "theorem 4.1": facts.theorem_4_1(unit, x, y, (0.0, 0.9 * margin)).margin,
        "theorem 4.2": min(facts.theorem_4_2(many, row, 0)[1].margin for row in flat),
        "theorem 4.3": rare.margin,
        "(4.22)": mean.margin,
        "theorem 4.6": facts.theorem_4_6(*_NOISE, seed=seed).margin,
        "proposition 4.2": facts.proposition_4_2(other[0], other[1], x, y, margin).margin,
        "lemma 4.2": facts.lemma_4_2(x, y, margin / 2)[1].margin,
        "lemma 4.3": 4 * deviation - abs(measured - exact),
        "corollary 4.2": facts.corollary_4_2((2.0, 4.0), (0.0, 1.0), modes, shares).margin,
        "(5.27)": facts.ratio_5_27(pull * np.linalg.norm(w)).margin,
        "theorem 5.1": nets.theorem_5_1((3, 9, 12), 8).margin,
        "theorem 5.2": nets.theorem_5_2((3, 9, 12), 8).margin,
    }
    budgets = np.array([0.0, 0.25, 0.5, 0.75]) * margin
    cosines = np.stack([facts.theorem_4_4(x, y, e, steps=20_000, record=12) for e in budgets])
    arrays = {
        "statements": np.array(list(margins)),
        "margins": np.array(list(margins.values())),
        "data_margin": margin,
        "budgets": budgets,
        "cosines": cosines,
    }

    def draw(path: Path) -> None:
        figure, axes = _axes(1)
        for budget, row in zip(budgets, cosines, strict=True):
            axes.plot(row, marker="o", label=f"eps = {budget:.2f}")
        axes.set_xlabel("steps, each point by a constant factor more")
        axes.set_ylabel("cosine with the max margin")
        axes.legend()
        figure.savefig(path)

    return arrays, draw


def _base(classes: int, shape: tuple[int, int, int], width: int) -> nn.Module:
    """Convolutions with batch norm that learns nothing, as the thesis' subnetworks have."""
    channels, height, breadth = shape

    def unit(into: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out, affine=False), nn.ReLU()]

    size = 2 * width * (-(-height // 2)) * (-(-breadth // 2))
    return nn.Sequential(
        *unit(channels, width, 1), *unit(width, 2 * width, 2), *unit(2 * width, 2 * width, 1), nn.Flatten(),
        nn.Linear(size, classes, bias=False), nn.BatchNorm1d(classes, affine=False),
    )  # fmt: skip


TOPICS: dict[str, Callable[[Tensor, Tensor, int], Found]] = {
    "difficulty": difficulty,
    "subnetwork": subnetwork,
    "theory": theory,
}
