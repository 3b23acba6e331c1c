"""The PGD family: fused steps, random starts, losses, and whole attacks on a small network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastrobust as fr

from . import pgd_attacks
from .case import (
    FLOOR,
    OURS,
    Agreement,
    Call,
    Candidate,
    Case,
    Context,
    Floor,
    Suite,
    Target,
    once,
    relative_difference,
)
from .peers import eager, inductor

EPS, STEP = 8 / 255, 2 / 255
L2_EPS, L2_STEP = 0.5, 0.125
L1_EPS, L1_STEP = 12.0, 3.0
FOSC_THRESHOLD = 0.05
ATAS_STEP, ATAS_BETA, ATAS_C = 16 / 255 * 0.01, 0.5, 0.01  # thesis section 5.2
# values in [0, 1] of 150 000 per example are rounded in every step and sum; ours rounds inwards where others to nearest
STEP_TOLERANCE = 2e-6

Shape = tuple[int, ...]
TINY_SHAPE: Shape = (16, 1, 28, 28)
CACHED_SHAPE: Shape = (128, 3, 32, 32)
DRAM_SHAPE: Shape = (64, 3, 224, 224)


def shape_text(shape: Shape) -> str:
    return "x".join(str(side) for side in shape)


def shapes(context: Context, *, large: bool = True) -> list[Shape]:
    """From 12 544 elements to 77 MB a tensor (twice that on a GPU); a smoke run takes the smallest alone."""
    if context.level == "smoke":
        return [(2, 1, 8, 8)]
    chosen = [TINY_SHAPE, CACHED_SHAPE, *([DRAM_SHAPE] if large else [])]
    if context.at_least("full"):
        chosen += [(128, 1, 28, 28), (8, 3, 224, 224), (128, 3, 224, 224)]
        if context.device.type == "cuda":
            chosen.append((256, 3, 224, 224))
    return sorted(chosen, key=math.prod)


def step_inputs(context: Context, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """x near x0, x0, and a gradient."""
    generator = context.generator()
    x0 = torch.rand(shape, generator=generator)
    x = (x0 + 0.02 * torch.randn(shape, generator=generator)).clamp_(0, 1)
    grad = torch.randn(shape, generator=generator)
    return x.to(context.device), x0.to(context.device), grad.to(context.device)


Inputs = Callable[[], Any]


def candidate(name: str, inputs: Inputs, function: Callable[..., Any], *args: Any) -> Candidate:
    """function(*inputs, *args)."""
    return Candidate(name, lambda: partial(function, *inputs(), *args))


def compiled(
    context: Context, inputs: Inputs, function: Callable[..., Any], *args: Any, level: str = "full"
) -> tuple[Candidate, ...]:
    """function under torch.compile, from the given level on: each compilation takes seconds."""
    if not context.at_least(level):
        return ()

    def build() -> Call:
        tensors = inputs()
        fast = inductor.compiled(lambda *values: function(*values, *args), *tensors)
        return partial(fast, *tensors)

    return (Candidate("torch.compile", build),)


def tuned(inputs: Inputs, make: Callable[[Tensor, float, float], eager.Step], step: float, eps: float) -> Candidate:
    def build() -> Call:
        x, x0, grad = inputs()
        return partial(make(x0, step, eps), x, grad, torch.empty_like(x))

    return Candidate("eager tuned", build)


def ours_step(inputs: Inputs, norm: float, step: float, eps: float) -> Candidate:
    """The fused step with out=."""

    def build() -> Call:
        x, x0, grad = inputs()
        out = torch.empty_like(x)
        return lambda: fr.ops.pgd_step(x, x0, grad, step, eps, norm=norm, out=out)

    return Candidate(OURS, build)


def step_targets(shape: Shape, device: torch.device) -> tuple[Target, ...]:
    if device.type == "cuda":
        return (Target(FLOOR, 0.85),) if math.prod(shape) * 4 >= 64e6 else ()
    if shape == CACHED_SHAPE:
        return (Target("eager torch", 5.0),)
    if shape == DRAM_SHAPE:
        return (Target("eager torch", 15.0), Target(FLOOR, 0.8))
    return ()


def step_cases(context: Context) -> Iterator[Case]:
    """pgd_step of each norm; the floor reads x, x0 and the gradient once and writes once."""
    for shape in shapes(context):
        inputs = once(partial(step_inputs, context, shape))
        axes = {"norm": "Linf", "shape": shape_text(shape)}
        yield Case(
            "pgd_step",
            axes,
            ours_step(inputs, math.inf, STEP, EPS),
            (
                candidate("eager torch", inputs, eager.linf_step, STEP, EPS),
                tuned(inputs, eager.tuned_linf_step, STEP, EPS),
                *compiled(context, inputs, eager.linf_step, STEP, EPS, level="smoke"),
            ),
            Floor(bytes=16 * math.prod(shape)),
            STEP_TOLERANCE,
            targets=step_targets(shape, context.device),
        )
    for shape in shapes(context):
        inputs = once(partial(step_inputs, context, shape))
        yield Case(
            "pgd_step",
            {"norm": "L2", "shape": shape_text(shape)},
            ours_step(inputs, 2, L2_STEP, L2_EPS),
            (
                candidate("eager torch", inputs, eager.l2_step, L2_STEP, L2_EPS),
                tuned(inputs, eager.tuned_l2_step, L2_STEP, L2_EPS),
                *compiled(context, inputs, eager.l2_step, L2_STEP, L2_EPS, level="default"),
            ),
            Floor(bytes=16 * math.prod(shape)),
            STEP_TOLERANCE,
            targets=(Target("eager torch", 4.0),) if shape in (CACHED_SHAPE, DRAM_SHAPE) else (),
        )
    for shape in shapes(context, large=context.at_least("full")):
        inputs = once(partial(step_inputs, context, shape))
        yield Case(
            "pgd_step",
            {"norm": "L1", "shape": shape_text(shape)},
            ours_step(inputs, 1, L1_STEP, L1_EPS),
            (candidate("eager torch", inputs, eager.l1_step, L1_STEP, L1_EPS),),
            Floor(bytes=16 * math.prod(shape)),
            2e-5,
        )


def half_inputs(context: Context, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    x, x0, grad = step_inputs(context, shape)
    return x, x0, grad.bfloat16()


def half_step(x: Tensor, x0: Tensor, grad: Tensor, step: float, eps: float) -> Tensor:
    """A bfloat16 gradient widened first: step * sign(g) in bfloat16 would round the step itself."""
    return eager.linf_step(x, x0, grad.float(), step, eps)


def half_cases(context: Context) -> Iterator[Case]:
    """The Linf step on the gradient of a model under autocast: state and result stay float32."""
    if context.level != "smoke" and not context.at_least("full"):
        return
    for shape in shapes(context):
        inputs = once(partial(half_inputs, context, shape))
        yield Case(
            "pgd_step bf16",
            {"norm": "Linf", "shape": shape_text(shape)},
            ours_step(inputs, math.inf, STEP, EPS),
            (
                candidate("eager torch", inputs, half_step, STEP, EPS),
                *compiled(context, inputs, half_step, STEP, EPS),
            ),
            Floor(bytes=14 * math.prod(shape)),
            STEP_TOLERANCE,
        )


def atas_inputs(context: Context, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, x0, grad = step_inputs(context, shape)
    v = torch.rand(len(x), generator=context.generator()).to(context.device)
    return x, x0, grad * 0.01, v


def fused_cases(context: Context) -> Iterator[Case]:
    """FOSC alone; the step with FOSC and the ATAS step, with out=."""
    for shape in shapes(context):
        inputs = once(partial(step_inputs, context, shape))
        axes = {"norm": "Linf", "shape": shape_text(shape)}
        elements, batch = math.prod(shape), shape[0]

        def ours_fosc(x: Tensor, x0: Tensor, grad: Tensor) -> Tensor:
            return fr.ops.fosc(x, x0, grad, EPS)

        yield Case(
            "fosc",
            axes,
            candidate(OURS, inputs, ours_fosc),
            (
                candidate("eager torch", inputs, eager.fosc, EPS),
                *compiled(context, inputs, eager.fosc, EPS),
            ),
            Floor(bytes=12 * elements),
            # sums of up to 150 528 products in float32; ours adds in float64
            1e-3,
        )

        def ours_step_fosc(inputs: Inputs = inputs) -> Call:
            x, x0, grad = inputs()
            active = torch.ones(len(x), dtype=torch.bool, device=x.device)  # a later call, where the criterion decides
            return partial(
                fr.ops.pgd_step_fosc, x, x0, grad, STEP, EPS, FOSC_THRESHOLD, active=active, out=torch.empty_like(x)
            )

        yield Case(
            "pgd_step_fosc",
            axes,
            Candidate(OURS, ours_step_fosc),
            (
                candidate("eager torch", inputs, eager.linf_step_fosc, STEP, EPS, FOSC_THRESHOLD),
                *compiled(context, inputs, eager.linf_step_fosc, STEP, EPS, FOSC_THRESHOLD),
            ),
            Floor(bytes=16 * elements + 8 * batch),
            1e-3,
        )
        with_v = once(partial(atas_inputs, context, shape))

        def ours_atas(with_v: Inputs = with_v) -> Call:
            x, x0, grad, v = with_v()
            out = torch.empty_like(x)
            return partial(fr.ops.atas_step, x, x0, grad, v, ATAS_STEP, EPS, beta=ATAS_BETA, c=ATAS_C, out=out)

        yield Case(
            "atas_step",
            axes,
            Candidate(OURS, ours_atas),
            (
                candidate("eager torch", with_v, eager.atas_step, ATAS_STEP, EPS, ATAS_BETA, ATAS_C),
                *compiled(context, with_v, eager.atas_step, ATAS_STEP, EPS, ATAS_BETA, ATAS_C),
            ),
            Floor(bytes=16 * elements + 8 * batch),
            1e-5,
        )


def same_distribution(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
    """Largest gap between the deciles of two random tensors: both sides draw other numbers from one distribution."""
    if ours.shape != theirs.shape:
        return Agreement(math.inf, False, "deciles")
    share = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)

    def deciles(value: Tensor) -> Tensor:
        flat = value.detach().flatten().double().cpu().sort().values
        return flat[(share * (len(flat) - 1)).long()]

    gap = float((deciles(ours) - deciles(theirs)).abs().max())
    return Agreement(gap, gap <= tolerance, "deciles")


def start_inputs(context: Context, shape: Shape) -> tuple[Tensor]:
    """Grey images, so that clipping to the box changes nothing and the perturbations can be compared."""
    return (torch.full(shape, 0.5, device=context.device),)


def start_cases(context: Context) -> Iterator[Case]:
    """random_start; the floor reads x0 and writes the start. The draws differ, so the deciles are compared."""
    peers = {math.inf: eager.linf_random_start, 2.0: eager.l2_random_start}
    for shape in shapes(context, large=context.at_least("full")):
        for norm, eps in ((math.inf, EPS), (2.0, L2_EPS)):
            inputs = once(partial(start_inputs, context, shape))

            def ours(x0: Tensor, norm: float = norm, eps: float = eps) -> Tensor:
                return fr.ops.random_start(x0, eps, norm=norm, seed=1)

            # six standard errors of a decile of the sample, with a floor for the tails of small ones
            spread = eps if norm == math.inf else eps / math.sqrt(math.prod(shape[1:]))
            yield Case(
                "random_start",
                {"norm": "Linf" if norm == math.inf else "L2", "shape": shape_text(shape)},
                candidate(OURS, inputs, ours),
                (candidate("eager torch", inputs, peers[norm], eps), *compiled(context, inputs, peers[norm], eps)),
                Floor(bytes=8 * math.prod(shape)),
                20 * spread / math.sqrt(math.prod(shape)),
                same_distribution,
            )


def loss_inputs(context: Context, batch: int, classes: int, name: str) -> tuple[Tensor, Tensor]:
    generator = context.generator()
    logits = 3 * torch.randn(batch, classes, generator=generator)
    if name == "kl_divergence":
        return logits.to(context.device), (logits + torch.randn(logits.shape, generator=generator)).to(context.device)
    return logits.to(context.device), torch.randint(classes, (batch,), generator=generator).to(context.device)


def loss_cases(context: Context) -> Iterator[Case]:
    """Value and logit gradient in one pass; the floor reads the logits and writes value and gradient."""
    sizes = [(4, 10)] if context.level == "smoke" else [(128, 10), (256, 1000)]
    if context.at_least("full"):
        sizes.append((4096, 1000))
    losses = {
        "cross_entropy": eager.cross_entropy,
        "margin_loss": eager.margin,
        "dlr_loss": eager.dlr,
        "kl_divergence": eager.kl,
    }
    for batch, classes in sizes:
        for name, peer in losses.items():
            inputs = once(partial(loss_inputs, context, batch, classes, name))

            def ours(logits: Tensor, other: Tensor, name: str = name) -> tuple[Tensor, Tensor]:
                value, gradient = getattr(fr.ops, name)(logits, other)
                return value, gradient

            def peer_build(peer: Callable[..., Any] = peer, inputs: Inputs = inputs) -> Call:
                return eager.with_gradient(peer, *inputs())

            def compiled_build(peer: Callable[..., Any] = peer, inputs: Inputs = inputs) -> Call:
                logits, other = inputs()
                fast = inductor.compiled(peer, logits.clone().requires_grad_(), other)
                return eager.with_gradient(fast, logits, other)

            peers = [Candidate("eager torch", peer_build)]
            if context.at_least("full"):
                peers.append(Candidate("torch.compile", compiled_build))
            read = 2 if name == "kl_divergence" else 1
            yield Case(
                name,
                {"shape": f"{batch}x{classes}"},
                candidate(OURS, inputs, ours),
                tuple(peers),
                Floor(bytes=4 * batch * classes * (read + 1) + 12 * batch),
                1e-5,
                relative_difference,
            )


def cases(context: Context) -> Iterator[Case]:
    yield from step_cases(context)
    yield from half_cases(context)
    yield from fused_cases(context)
    yield from start_cases(context)
    yield from loss_cases(context)
    yield from pgd_attacks.cases(context)


SUITE = Suite("pgd", cases, "fused PGD steps, FOSC, ATAS, random starts, losses, and whole PGD attacks")
