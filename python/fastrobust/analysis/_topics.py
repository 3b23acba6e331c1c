"""What ``fastrobust analyse NAME`` runs: TOPICS, name -> function(images, labels, seed) -> (arrays, draw(path))."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import attacks, training
from ..nn import zoo
from . import connectivity
from . import fosc as criteria
from . import landscape as landscapes
from . import trajectory as trajectories

Arrays = dict[str, Any]
Draw = Callable[[Path], None]
Topic = Callable[[Tensor, Tensor, int], tuple[Arrays, Draw]]


def trajectory(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Deng et al., figures 1 to 3: the way from minima to maxima of the adversary's loss, by input scale and ratio,
    of a 2-D toy, of an untrained CNN, and (input scale 0.1) of the CNN after epochs of adversarial training at ratio
    0.3: at ratio 10 it learns nothing."""
    net = trajectories.TwoLayer(2, 1000, seed)
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    squared = lambda p: (1 - net(p)) ** 2
    toy = trajectories.study(squared, points, (0.01, 1, 100), (0.1, 1, 10), steps=200, seed=seed)
    size = points.norm(dim=1).mean()
    peaks = [
        [np.mean([trajectories.circle(squared, p * s / size, s * r)[2] for p in points]) for r in toy.ratios.tolist()]
        for s in toy.scales.tolist()
    ]
    few = images[:8].double()
    model = _smooth(images, labels, seed)

    def seen(scales: Sequence[float], ratios: Sequence[float]) -> trajectories.Study:
        frozen = copy.deepcopy(model).double().eval()
        loss = lambda p: cross_entropy(frozen(p), labels[:8], reduction="none")
        return trajectories.study(loss, few, scales, ratios, seed=seed)

    cnn = seen((0.1, 10, 1000), (0.001, 0.1, 10))
    epochs, after = [0], [seen((0.1,), (0.3, 10.0))]

    def look(_: nn.Module, record: dict[str, float]) -> None:
        if record["epoch"] in (3, 30):
            epochs.append(int(record["epoch"]))
            after.append(seen((0.1,), (0.3, 10.0)))

    scaled = images * (0.1 / images.flatten(1).norm(dim=1).mean())
    method = training.make("pgd", eps=0.03, norm=2, steps=5, clip=None)
    batches = training.loader(scaled, labels, 64, seed=seed)
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    training.train(model, batches, method, epochs=30, optimizer=adam, callbacks=look)
    arrays: Arrays = {f"toy_{k}": v.numpy() for k, v in toy._asdict().items()}
    arrays |= {f"cnn_{k}": v.numpy() for k, v in cnn._asdict().items()}
    arrays |= {
        f"epochs_{k}": torch.cat([getattr(s, k) for s in after]).numpy() for k in ("losses", "best", "half", "passed")
    }
    arrays |= {"toy_peaks": np.array(peaks), "epochs": np.array(epochs)}

    return arrays, _drawn(lambda figure: _plot_trajectory(figure, arrays), (9, 9))


def _plot_trajectory(figure: Any, arrays: Arrays) -> None:
    fields = trajectories.Study._fields
    parts = figure.subfigures(3, 1)
    for part, name, title in zip(parts, ("toy", "cnn"), ("2-D toy", "CNN, not trained"), strict=False):
        trajectories.plot(trajectories.Study(*(torch.as_tensor(arrays[f"{name}_{k}"]) for k in fields)), part)
        part.suptitle(title)
    # one study whose "scales" are the epochs, each at input scale 0.1
    rows = (torch.as_tensor(arrays[f"epochs_{k}"]) for k in fields[2:])
    trained = trajectories.Study(torch.as_tensor(arrays["epochs"]), torch.tensor([0.3, 10.0]), *rows)
    trajectories.plot(trained, parts[2], "epoch")
    parts[2].suptitle("CNN, input scale 0.1")


def landscape(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis figures 4.4 to 4.8: LeNets trained for several eps; gradient norms, top Hessian eigenvalues, loss
    surfaces, cosines of perturbations, and the Bezier curve to a second network, each of the adversarial loss at the
    training's eps."""
    arrays: Arrays = {"eps": np.array(_EPS), "t": np.linspace(0, 1, 11), "a": np.linspace(-1, 1, 11)}
    rows: dict[str, list[Any]] = {}
    curves, spectra = {}, {}
    x, y = images[:256], labels[:256]
    noise = torch.randn(
        1, landscapes.flat(_lenet(images, labels, 0)).numel(), generator=torch.Generator().manual_seed(seed)
    )
    for eps in _EPS:
        attack = lambda m, a, b, eps=eps: attacks.pgd(m, a, b, eps=eps, steps=10, step_size=eps / 4, seed=seed)
        quick = lambda m, a, b, eps=eps: attacks.pgd(m, a, b, eps=eps, steps=4, step_size=eps / 2, seed=seed)
        restarted = lambda m, a, b, eps=eps: attacks.pgd(m, a, b, eps=eps, steps=10, step_size=eps / 4)
        batches = training.loader(images, labels, 64, seed=seed)
        nets = [_lenet(images, labels, 2 * seed + i) for i in range(2)]
        fresh = landscapes.loss_at(nets[0], landscapes.flat(nets[0]), x, y, attack)
        for net in nets:
            method = training.make("pgd", eps=eps, steps=5, step_size=eps / 2) if eps else "plain"
            training.train(net, batches, method, epochs=12, optimizer=torch.optim.Adam(net.parameters(), 2e-3))
        net = nets[0]
        adv = attack(net, x, y)
        pairs = landscapes.hessian_eigenpairs(net, adv, y, k=20, steps=100, seed=seed)
        top = landscapes.surface(net, x, y, quick, pairs.vectors[:1], arrays["a"])
        random = landscapes.surface(net, x, y, quick, noise / noise.norm(), arrays["a"])
        row = {
            "gradient_norm": landscapes.gradient_norms(net, batches, attack).mean(),
            "eigenvalues": pairs.values, "residuals": pairs.residuals, "normalised": pairs.values / fresh,
            "surface_top": top, "surface_random": random,
        }  # fmt: skip
        if eps:  # without a perturbation there is no angle
            for name, v in (("top", pairs.vectors[0]), ("random", noise[0] / noise.norm())):
                row[f"cosines_{name}"] = landscapes.perturbation_cosines(net, x, y, restarted, v, arrays["a"][5:])
        curve = connectivity.connect(nets[0], nets[1], batches, quick, epochs=20, lr=5e-3, seed=seed)
        found = connectivity.along(net, curve, arrays["t"], x, y, attack, [(images, labels)])
        row |= {"curve_loss": found.loss, "curve_error": found.error}
        curves[f"eps {eps:g}"], spectra[f"eps {eps:g}"] = found, pairs.values
        for key, value in row.items():
            rows.setdefault(key, []).append(value.detach().numpy())
    arrays |= {key: np.stack(value) for key, value in rows.items()}

    def plot(figure: Any) -> None:
        left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
        landscapes.plot_eigenvalues(spectra, left)
        connectivity.plot(curves, right)

    return arrays, _drawn(plot, (12, 4))


def early(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis figure 4.3: gradient norm, error and distance from the start over the first updates of a LeNet, by eps."""
    budgets, count = (0.0, 0.1, 0.2, 0.4), _UPDATES
    rows: dict[str, list[Tensor]] = {"norms": [], "errors": [], "distances": []}
    for eps in budgets:
        attack = lambda m, a, b, eps=eps: attacks.pgd(m, a, b, eps=eps, steps=10, step_size=eps / 4) if eps else a
        net, batches = _lenet(images, labels, seed), training.loader(images, labels, 64, seed=seed)
        found = landscapes.first_updates(net, batches, attack, updates=count, lr=0.05, seed=seed)
        for key, value in found._asdict().items():
            rows[key].append(value)
    arrays: Arrays = {"eps": np.array(budgets), **{key: torch.stack(row).numpy() for key, row in rows.items()}}
    tenth = max(1, count // 10)
    arrays |= {f"{key}_by_tenth": arrays[key][:, : 10 * tenth].reshape(4, -1, tenth).mean(-1) for key in rows}

    def plot(figure: Any) -> None:
        for panel, key in zip(figure.subplots(1, 3), rows, strict=True):
            line = arrays[f"{key}_by_tenth"]
            for eps, values in zip(budgets, line, strict=True):
                panel.plot(tenth * (1 + np.arange(len(values))), values, label=f"eps {eps:g}")
            panel.set(
                title={"norms": "gradient norm", "errors": "error", "distances": "distance"}[key], xlabel="update"
            )
            panel.legend(fontsize=7)

    return arrays, _drawn(plot, (11, 3.6))


def fosc(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Wang et al., figures 1 to 3: FOSC by step size (eps to eps/8, 20 steps), by number of steps (10 to 40 of
    eps/6), by epoch of adversarial training (steps of eps/4 and eps/8), without a box; success and loss by FOSC,
    without and with the box."""
    eps, batches = 0.1, training.loader(images, labels, 64, seed=seed)
    x, y = images[:1000], labels[:1000]
    epochs = (2, 10, 20)
    density: dict[str, Tensor] = {}
    for part in (4, 8):
        net = _lenet(images, labels, seed)

        def look(model: nn.Module, record: dict[str, float], part: int = part) -> None:
            if record["epoch"] in epochs:
                found = criteria.by_attack(model, x, y, eps, [(10, eps / part)], seed=seed, clip=None)
                density[f"eps/{part}, epoch {record['epoch']:g}"] = found.fosc[0]

        method = training.make("pgd", eps=eps, steps=10, step_size=eps / part)
        training.train(
            net, batches, method, epochs=20, optimizer=torch.optim.Adam(net.parameters(), 2e-3), callbacks=look
        )
        if part == 4:
            lengths = criteria.by_attack(net, x, y, eps, [(20, eps / k) for k in (1, 2, 4, 6, 8)], seed=seed, clip=None)
            numbers = criteria.by_attack(net, x, y, eps, [(k, eps / 6) for k in (10, 20, 30, 40)], seed=seed, clip=None)
            path = criteria.by_attack(net, x, y, eps, [(k, eps / 4) for k in range(1, 11)], seed=seed, clip=None)
            boxed = criteria.by_attack(net, x, y, eps, [(10, eps / 4)], seed=seed)
    grouped = {}
    for name, values in (
        ("ball", criteria.Measured(*(v[-1] for v in path))),
        ("box", criteria.Measured(*(v[0] for v in boxed))),
    ):
        # of equal count, not of equal width: most of the examples are in the first of 20 equal widths
        grouped[name] = criteria.groups(
            values, values.fosc.double().quantile(torch.linspace(0, 1, 11).double()).float()
        )
    middle = lambda found: found.median(1).values.numpy()
    arrays: Arrays = {
        "step_eps_over": np.array([1, 2, 4, 6, 8]), "median_by_step": middle(lengths.fosc),
        "loss_by_step": lengths.loss.mean(1).numpy(), "steps": np.array([10, 20, 30, 40]),
        "median_by_steps": middle(numbers.fosc), "loss_by_steps": numbers.loss.mean(1).numpy(),
        "median_on_path": middle(path.fosc), "loss_on_path": path.loss.mean(1).numpy(), "epochs": np.array(epochs),
        "fosc_by_step": lengths.fosc.numpy(), "fosc_by_steps": numbers.fosc.numpy(),
        "fosc_by_epoch": torch.stack(list(density.values())).view(2, len(epochs), -1).numpy(),
    }  # fmt: skip
    arrays["median_by_epoch"] = np.median(arrays["fosc_by_epoch"], -1)
    arrays["mean_by_epoch"] = arrays["fosc_by_epoch"].mean(-1)
    arrays |= {f"{name}_{k}": v.numpy() for name, group in grouped.items() for k, v in group._asdict().items()}
    return arrays, _drawn(lambda figure: criteria.plot(density, grouped["ball"], figure), (11, 4))


_EPS, _UPDATES = (0.0, 0.1, 0.2), 200


def _lenet(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return zoo.lenet(int(labels.max()) + 1, tuple(images.shape[1:]), width=4)


def _smooth(images: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """A small CNN with a second derivative; its weights are drawn from the seed."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(images.shape[1], 16, 3, 1, 1), nn.Softplus(), nn.Conv2d(16, 16, 3, 2, 1), nn.Softplus(), nn.Flatten()
    )  # fmt: skip
    return net.append(nn.Linear(net(images[:1]).shape[1], int(labels.max()) + 1))


def _drawn(plot: Callable[[Any], None], size: tuple[float, float]) -> Draw:
    def draw(path: Path) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        plot(figure)
        figure.savefig(path, dpi=110)

    return draw


TOPICS: dict[str, Topic] = {"trajectory": trajectory, "early": early, "landscape": landscape, "fosc": fosc}
