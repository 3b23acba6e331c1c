"""What is left of a network below a stage, where it is a chain of ReLUs: kernels that leave out neurons without lines,
and the gradients of a first dense layer from signs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _chain as chain
from ._live import LiveStep, concretize_live, leaving_out_pays
from ._product import sign_product
from ._rows import Groups
from ._stage import Held, Link, Parameters, Rows, Stage

MANY = 64  # rows from which on tables of sums pay
FEW = 0.6  # living neurons up to which leaving out the others pays more
Pair = tuple[Any, Any]


class Chain(NamedTuple):
    """The stages of a chain, the last one first, and what they do to rows. The way down keeps the rows that came and
    those below each layer."""

    order: list[int]
    steps: list[LiveStep]
    A: Any = None
    pick: Pair = (None, None)
    between: Any = None


def groups_of(rows: Rows, batch: int, device: torch.device) -> Groups:
    """``by_example`` of rows that come in order, as many of each example."""
    per = len(rows.plus) // max(1, batch)
    return torch.arange(0, len(rows.plus) + 1, max(1, per), device=device), None


def only_link(stage: Stage) -> Link | None:
    """That of a ReLU behind one product."""
    if stage.kind != "relu" or len(stage.links) != 1:
        return None
    link = stage.links[0]
    plain = link.at is not None and link.sign == 1 and link.groups == 1 and link.dilation == (1, 1)
    return link if plain and stage.box is None else None


def chain_below(stages: list[Stage], given: Parameters, held: list[Held], top: int) -> Chain | None:
    """From stage ``top`` to the input; None where there is anything but ReLUs and a product before each."""
    found, i = Chain([], []), top
    while i > 0:
        link, at = only_link(stages[i]), held[i]
        if link is None or link.at is None:
            return None
        w, before = given.weights[link.at], stages[link.source].shape
        w = w.unflatten(1, before) if link.dense else w
        found.order.append(i)
        step = LiveStep(at.slopes, at.intercepts, stages[i].shape, w, link.stride, link.padding, before)
        found.steps.append(step)
        i = link.source
    return found


def rows_of_chain(
    stages: list[Stage], given: Parameters, held: list[Held], top: int, A: Tensor, pick: Pair, b: Tensor, rows: Rows,
    kept: dict[Any, Any] | None,
) -> Tensor | None:  # fmt: skip
    """The bounds of rows at stage ``top`` through the chain that is below; None where there is none, or where the
    neurons without lines are few. Where gradients are recorded, dense layers go down one by one but for the first."""
    found = chain_below(stages, given, held, top)
    if found is None or not b.is_cpu:
        return None
    steps, box = found.steps, (held[0].center, held[0].radius)
    dense = [stages[i].links[0].dense for i in found.order]
    if kept is not None and any(dense) and len(dense) > 1:
        return None
    batch, apart = len(box[0]), b.shape[0] * steps[0].slopes.shape[0] == 4
    shares = [held[i].living for i in found.order]
    live = leaving_out_pays(steps, len(rows.plus) // max(1, batch) * (1 + apart), shares)
    convolutions = kept is not None and not any(dense) and len(steps) <= chain.MOST_STEPS
    if not live and not convolutions:
        return None
    below: Any = None
    if kept is not None and convolutions:
        below = chain.between_of(steps, A.shape[0], b)
        kept["chain"] = found._replace(A=A, pick=pick, between=below)
    elif kept is not None:
        below = [b.new_empty(1 + apart, b.shape[1], box[0].shape[1])]
        kept["living"] = found._replace(A=A, pick=pick, between=below)
    if live:
        groups = groups_of(rows, batch, b.device)
        return concretize_live(A, b, rows.example, steps, box, None, 1.0, *pick, below, groups)
    return chain.through(A, b, rows.example, conv_steps(steps), box, *pick, below)


def conv_steps(steps: list[LiveStep]) -> list[chain.ConvStep]:
    return [chain.ConvStep(*step) for step in steps]


def signs_pay(shared: bool, living: float) -> bool:
    """Whether ``from_signs`` is worth a try: one radius for all, and the share of living neurons."""
    return shared and living >= FEW


def from_signs(
    A: Tensor, scaled: Tensor, w: Tensor, bias: Tensor | None, center: Tensor, radius: Tensor, g: Tensor,
    example: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """For rows A (k, R, n) = scaled W, scaled (k, R, m), that meet one radius (n,) in every example: gradients of
    ``scaled``, of W as far as the radius goes and of W c (B, m), c the centres; ``center``: of W c + bias. With respect
    to a the derivative of a bound is f c + h sign(a) r: what c multiplies is known from the intervals, and products
    with signs are cheap. None where this is not the way."""
    k, rows, n = A.shape
    m, batch = len(w), len(center)
    if min(rows, n) < MANY or m < 16:
        return None
    f, h = _factors(g, k)
    flat, given = A.flatten(0, 1), scaled.flatten(0, 1)
    to_scaled, to_w = torch.empty_like(given), torch.empty_like(w)
    base = center if bias is None else center - bias, f, example.repeat(k)
    if not (
        sign_product(flat.t(), given, radius, to_w.t(), h) and sign_product(flat, w.t(), h, to_scaled, radius, base)
    ):
        return None
    through = torch.bmm(f.view(k * batch, 1, -1), given.view(k * batch, -1, m)).view(k, batch, m)
    return to_scaled.view(k, rows, m), to_w, through[0] if k == 1 else through.sum(0)


def _factors(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The derivative of the bounds of rows a with respect to a is f c + h sign(a) r: f and h (k R,) from g (sides, R),
    where k matrices serve the sides."""
    if len(g) == 1:
        return g[0], -g[0]
    if k == 2:
        return g.view(-1), torch.cat([-g[0], g[1]])
    return g[0] + g[1], g[1] - g[0]
