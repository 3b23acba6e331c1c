"""Best slopes ("alpha-crown") against auto_LiRPA's CROWN-Optimized: time and margins at equal iterations, in one
process.

    python -m benchmarks.slopes [--data FOLDER] [--iterations 20] [--repeats 5] [--networks NAME ...] [--out FILE.json]

The two take turns, and the ratio is the median over turns of theirs by ours. FC1 and CNN have the authors' weights
where FOLDER/polyenvelope holds them (else random ones). "gain" is what the lower bounds of the margins gain on
CROWN's, "least" and "mean" are of ours less theirs. The bar: 10 times, and no mean margin below theirs. auto_LiRPA
keeps CROWN's intervals of hidden neurons by default, as ``hidden=0`` does here; with --hidden ours look for those,
too, and theirs optimise them (``fix_interm_bounds`` False).
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.certify.checkpoints import load_model
from fastrobust.models import mnist_cnn

from .table_file import TableFile

BAR = 10.0
NETWORKS = ("fc1", "cnn", "residual", "deep")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(torch.relu(self.first(x)))
        return torch.relu(out)


def network(name: str, folder: Path | None) -> tuple[nn.Module, tuple[int, ...], float]:
    """The network, the shape of an image, eps."""
    torch.manual_seed(0)
    layout = {"fc1": "fc1", "cnn": "cnn"}.get(name)
    if layout is not None:
        file = None if folder is None else folder / "polyenvelope" / "relu_linf" / f"mnist_{name}_l1_c-perat.ckpt"
        if file is not None and file.is_file():
            return load_model(file, layout=layout), (1, 28, 28), 0.1
        if name == "cnn":
            return mnist_cnn().eval(), (1, 28, 28), 0.02
        made = nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))
        return made.eval(), (1, 28, 28), 0.02
    if name == "deep":
        layers: list[nn.Module] = [nn.Flatten()]
        for i in range(4):
            layers += [nn.Linear(784 if i == 0 else 100, 100), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(100, 10)).eval(), (1, 28, 28), 0.02
    # small: auto_LiRPA keeps slopes of every hidden neuron for every other, and takes minutes beyond this size
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), Block(4), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), Block(8), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    return made.eval(), (1, 16, 16), 0.1


def images(shape: tuple[int, ...], batch: int, folder: Path | None) -> Tensor:
    if shape == (1, 28, 28) and folder is not None and (folder / "mnist.npz").is_file():
        return fr.data.load("mnist", "test", folder=folder, limit=batch).images
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(1))


def theirs(model: nn.Module, x: Tensor, y: Tensor, eps: float, iterations: int, hidden: bool) -> Callable[[], Tensor]:
    peer: Any = importlib.import_module("auto_LiRPA")

    eye = torch.eye(10)
    C = (eye[y][:, None] - eye[None])[~eye[y].bool()].view(len(y), 9, 10)
    options: dict[str, Any] = {"optimize_bound_args": {"iteration": iterations, "fix_interm_bounds": not hidden}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = peer.BoundedModule(model, x, device="cpu", bound_opts=options)
    low, up = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    given = peer.BoundedTensor(x, peer.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=up))

    def call() -> Tensor:
        found: Tensor = module.compute_bounds(x=(given,), C=C, method="CROWN-Optimized", bound_upper=False)[0]
        return found.detach()

    return call


def ours(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, iterations: int, hidden: bool, method: str = "alpha-crown"
) -> Callable[[], Tensor]:
    search = fr.bounds.SlopeSearch(iterations, hidden=iterations if hidden else 0)

    def call() -> Tensor:
        with torch.no_grad():
            found = fr.bounds.compute_bounds(
                model, x, eps, clip=(0, 1), method=method, labels=y, sides="lower",
                slopes=search if method == "alpha-crown" else None,
            )  # fmt: skip
            return found.lower

    return call


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    out = call()
    return time.perf_counter() - start, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTROBUST_DATA"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", action="store_true", help="intervals of hidden neurons by their best slopes, too")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args()
    folder = None if args.data is None else Path(args.data)
    table = TableFile(args.out, "alpha-crown against auto_LiRPA's CROWN-Optimized")
    heads = ("ours ms", "theirs ms", "ratio", "gain ours", "theirs", "least", "mean")
    print(f"{'network':<12}" + "".join(f"{h:>11}" for h in heads), flush=True)
    for name in args.networks:
        model, shape, eps = network(name, folder)
        model.requires_grad_(False)
        x = images(shape, args.batch, folder)
        with torch.no_grad():
            y = model(x).argmax(1)
        first = ours(model, x, y, eps, args.iterations, args.hidden)
        second = theirs(model, x, y, eps, args.iterations, args.hidden)
        plain = ours(model, x, y, eps, args.iterations, args.hidden, "crown")()
        first(), second()
        mine, other = [], []
        for _ in range(args.repeats):
            seconds, a = timed(first)
            mine.append(seconds)
            seconds, b = timed(second)
            other.append(seconds)
        ratio = statistics.median(t / s for s, t in zip(mine, other, strict=True))
        row = {
            "ours_ms": 1e3 * statistics.median(mine), "theirs_ms": 1e3 * statistics.median(other), "ratio": ratio,
            "gain_ours": (a - plain).mean().item(), "gain_theirs": (b - plain).mean().item(),
            "least_difference": (a - b).min().item(), "mean_difference": (a - b).mean().item(),
        }  # fmt: skip
        print(f"{name:<12}" + "".join(f"{v:11.{1 if i < 3 else 5}f}" for i, v in enumerate(row.values())), flush=True)
        about = {"network": name, "batch": args.batch, "iterations": args.iterations, "hidden": args.hidden, "eps": eps}
        met = ratio >= BAR and row["mean_difference"] >= -1e-5
        table.add(f"{name} {'hidden' if args.hidden else 'output'}", about | row | {"bar": BAR, "met": met})


if __name__ == "__main__":
    main()
