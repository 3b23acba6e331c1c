"""What a step of an attack costs beside the model's own passes, ours and the public AutoAttack's, in one run.

    python -m benchmarks.attack_steps [--batch 64 250] [--out FILE]

APGD, FAB and Square, three norms, on an MNIST CNN and a CIFAR-size CNN whose examples cannot be fooled at these radii, so
that none leaves. The time of the model's forward passes and of autograd is taken out of each run as it passes; what is left is
the attack's. (The public attacks' losses go backward through torch, so that a part of theirs counts as the model's.)
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrobust as fr

from . import models
from .case import Unavailable
from .peers import require
from .table_file import TableFile

NORMS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
RADII = {"Linf": 1e-3, "L2": 1e-2, "L1": 1e-1}
NETWORKS = {"MNIST CNN": (1, 28), "CIFAR-size CNN": (3, 32)}
STEPS = {"apgd": 50, "fab": 20, "square": 100}
BAR = 0.1


class Timed:
    """A model that knows how long its passes took."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seconds, self.passes = model, 0.0, 0

    def __call__(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        found: Tensor = self.model(x)
        self.seconds += time.perf_counter() - start
        self.passes += 1
        return found


@contextlib.contextmanager
def timed_autograd(model: Timed) -> Iterator[None]:
    """Backward passes count as the model's."""
    before = torch.autograd.grad, torch.autograd.backward

    def wrapped(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = f(*args, **options)
            model.seconds += time.perf_counter() - start
            return found

        return run

    torch.autograd.grad, torch.autograd.backward = wrapped(before[0]), wrapped(before[1])
    try:
        yield
    finally:
        torch.autograd.grad, torch.autograd.backward = before


def pair(attack: str, norm: str, model: Timed, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """The same steps by both."""
    peer = lambda part: require(f"autoattack.{part}", "a checkout of https://github.com/fra31/auto-attack")
    APGDAttack = peer("autopgd_base").APGDAttack  # noqa: N806
    FABAttack, SquareAttack = peer("fab_pt").FABAttack_PT, peer("square").SquareAttack  # noqa: N806

    eps, steps = RADII[norm], STEPS[attack]
    ours: dict[str, Any] = {"eps": eps, "norm": norm, "seed": 0}
    if attack == "apgd":
        public = APGDAttack(
            model, n_iter=steps, norm=norm, n_restarts=1, eps=eps, seed=0, loss="ce", eot_iter=1, rho=0.75, device="cpu"
        )
        return {
            "ours": lambda: fr.attacks.apgd(model, x, y, steps=steps, **ours),
            "public": lambda: public.perturb(x, y),
        }
    if attack == "fab":
        near = FABAttack(
            model, n_restarts=1, n_iter=steps, eps=eps, seed=0, norm=norm, verbose=False, device="cpu", targeted=True,
            n_target_classes=1,
        )  # fmt: skip
        call = lambda: fr.attacks.fab(model, x, y, steps=steps, targets=1, **ours)
        return {"ours": call, "public": lambda: near.perturb(x, y)}
    search = SquareAttack(
        model, p_init=0.8, n_queries=steps, eps=eps, norm=norm, n_restarts=1, seed=0, verbose=False, device="cpu",
        resc_schedule=False,
    )  # fmt: skip
    call = lambda: fr.attacks.square(model, x, y, queries=steps, **ours)
    return {"ours": call, "public": lambda: search.perturb(x, y)}


def row(attack: str, norm: str, network: str, batch: int, rounds: int) -> dict[str, Any]:
    """Microseconds a step beside the passes, the least of some rounds in turns; their ratio."""
    torch.manual_seed(0)
    channels, size = NETWORKS[network]
    net = models.frozen(models.small_cnn(channels, size))
    x = torch.rand(batch, channels, size, size)
    y = net(x).argmax(1)
    model = Timed(net)
    found: dict[str, Any] = {"attack": attack, "norm": norm, "network": network, "batch": batch, "steps": STEPS[attack]}
    calls = pair(attack, norm, model, x, y)
    for turn in range(rounds + 1):
        for name, call in calls.items():
            model.seconds, model.passes = 0.0, 0
            with timed_autograd(model):
                start = time.perf_counter()
                call()
                whole = time.perf_counter() - start
            if turn:  # the first is a warm-up
                beside = 1e6 * (whole - model.seconds) / STEPS[attack]
                found[f"{name}_us"] = min(found.get(f"{name}_us", math.inf), beside)
                found[f"{name}_whole_us"] = min(found.get(f"{name}_whole_us", math.inf), 1e6 * whole / STEPS[attack])
                found[f"{name}_passes"] = model.passes
    return found | {"share": found["ours_us"] / found["public_us"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 250])
    parser.add_argument("--attacks", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args(argv)
    table = TableFile(
        args.out, "microseconds of a step beside the model's passes, and their share of the public attack's"
    )
    print(f"share of the public attack's time beside the passes (bar: {BAR}); whole: of its whole time")
    for network in NETWORKS:
        for batch in args.batch:
            for attack in args.attacks:
                for norm in NORMS:
                    try:
                        found = row(attack, norm, network, batch, args.rounds)
                    except Unavailable as error:
                        print(error)
                        return 1
                    table.add(f"{network} {batch} {attack} {norm}", found)
                    print(
                        f"{network:14} batch {batch:4} {attack:6} {norm:4} ours {found['ours_us']:7.0f} us, public "
                        f"{found['public_us']:7.0f} us: {found['share']:.2f}; whole "
                        f"{found['ours_whole_us'] / found['public_whole_us']:.2f}",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
