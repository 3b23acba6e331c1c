"""What a step of an attack costs beside the model's own passes, ours and the public AutoAttack's, in one run.

    python -m benchmarks.attack_steps [--batch 64 250] [--out FILE]

APGD, FAB and Square, three norms, on an MNIST CNN and a CIFAR-size CNN whose examples cannot be fooled at these radii,
so that none leaves. The time of the model's forward passes and of autograd is taken out of each run as it passes; what
is left is the attack's. (The public attacks' losses go backward through torch, so that a part of theirs counts as the
model's.)
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastrobust as fr

from . import models
from .case import OURS, Agreement, Call, Candidate, Case, Compare, Context, Floor, Target, Unavailable, once
from .peers import adv_lib, auto_attack
from .table_file import TableFile

Problem = tuple[nn.Module, Tensor, Tensor]
PEERS = {"AutoAttack": auto_attack, "adv-lib": adv_lib}

NORMS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
RADII = {"Linf": 1e-3, "L2": 1e-2, "L1": 1e-1}
NETWORKS = {"MNIST CNN": (1, 28), "CIFAR-size CNN": (3, 32)}
STEPS = {"apgd": 50, "fab": 20, "square": 100}
FEW = 3  # of a smoke run
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


def ours_of(attack: str, norm: str, steps: int, model: Any, x: Tensor, y: Tensor) -> Call:
    options: dict[str, Any] = {"eps": RADII[norm], "norm": norm, "seed": 0}
    if attack == "apgd":
        return lambda: fr.attacks.apgd(model, x, y, steps=steps, **options)
    if attack == "fab":
        return lambda: fr.attacks.fab(model, x, y, steps=steps, targets=1, **options)
    return lambda: fr.attacks.square(model, x, y, queries=steps, **options)


def pair(attack: str, norm: str, model: Timed, x: Tensor, y: Tensor) -> dict[str, Call]:
    """The same steps by both."""
    public = auto_attack.steps(attack, model, x, y, norm=norm, eps=RADII[norm], steps=STEPS[attack])
    return {"ours": ours_of(attack, norm, STEPS[attack], model, x, y), "public": public}


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


def passes_alone(attack: str, steps: int, given: Callable[[], Problem]) -> Call:
    """The passes of the model that so many steps cannot do without."""
    model, x, y = given()

    def call() -> Tensor:
        found = x
        for _ in range(steps):
            if attack == "square":
                with torch.no_grad():
                    found = model(x)
            else:
                leaf = x.detach().requires_grad_()
                (found,) = torch.autograd.grad(functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        return found

    return call


def same_verdicts(given: Callable[[], Problem], norm: float, eps: float) -> Compare:
    """Both lie in ball and box, and fool the model as often."""

    def compare(mine: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
        model, x, y = given()
        fooled = []
        for adv in (mine, theirs):
            if adv.shape != x.shape or not bool(((adv >= 0) & (adv <= 1)).all()):
                return Agreement(math.inf, False, "shape and box")
            # the peers overshoot the ball by roundings; what counts here is that none searches a larger one
            if float((adv.detach() - x).double().flatten(1).norm(p=norm, dim=1).max()) > eps * (1 + 1e-4):
                return Agreement(math.inf, False, "ball")
            with torch.no_grad():
                fooled.append(int((model(adv).argmax(1) != y).sum()))
        gap = abs(fooled[0] - fooled[1])
        return Agreement(gap, gap <= tolerance, "examples fooled")

    return compare


def problem(context: Context, network: str, batch: int) -> Problem:
    channels, size = NETWORKS[network]
    net = models.frozen(models.small_cnn(channels, size, seed=context.seed)).to(context.device)
    x = torch.rand(batch, channels, size, size, generator=context.generator()).to(context.device)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


def cases(context: Context) -> Iterator[Case]:
    """Rows of the suite `attacks`: some steps of each attack, whole, with the passes as their floor."""
    smoke = context.level == "smoke"
    networks = list(NETWORKS) if context.at_least("full") else list(NETWORKS)[:1]
    batches = (2,) if smoke else (64, 250) if context.at_least("full") else (64,)
    for network, batch in ((network, batch) for network in networks for batch in batches):
        given = once(partial(problem, context, network, batch))
        model = lambda given=given: given()[0]
        for attack, (norm, p) in ((attack, of) for attack in STEPS for of in NORMS.items()):
            steps = FEW if smoke else STEPS[attack]
            options: dict[str, Any] = {"norm": norm, "eps": RADII[norm], "steps": steps}

            def of(library: Any, given: Any = given, attack: str = attack, options: Any = options) -> Call:
                return library.steps(attack, *given(), **options)

            def own(given: Any = given, attack: str = attack, norm: str = norm, steps: int = steps) -> Call:
                return ours_of(attack, norm, steps, *given())

            yield Case(
                f"{attack} {steps} steps",
                {"norm": norm, "model": network, "batch": batch},
                Candidate(OURS, own, model),
                tuple(Candidate(name, partial(of, library), model) for name, library in PEERS.items()),
                Floor(part=partial(passes_alone, attack, steps, given), part_name="passes"),
                0.0,
                same_verdicts(given, p, RADII[norm]),
                () if smoke else (Target("AutoAttack", 1.0),),
                0.5,
            )


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
