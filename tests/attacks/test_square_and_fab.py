"""Square and FAB against what their papers say, on models where the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks._windows import bump, share_at
from fastrobust.ops.pgd.square import NO_WINDOW, Window, square_propose


class _RowByRow(nn.Module):
    """A model whose outputs for an example are the same bits in any batch, and which has no gradient."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(3)
        self.weight = torch.randn(classes, 2, 7, 5, generator=rng)
        self.grad_mode: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.grad_mode.append(torch.is_grad_enabled() or x.requires_grad)
        rows = [torch.stack([(row * w).sum() for w in self.weight]) for row in x]
        return torch.stack(rows).detach()


def _batch(n: int, shape: tuple[int, ...] = (2, 7, 5)) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("norm", h.NORMS)
def test_square_asks_for_no_gradient_and_knows_no_batch(norm: float) -> None:
    model, x = _RowByRow(), _batch(6)
    y = model(x).argmax(1)
    model.grad_mode.clear()
    call = lambda rows, first: fr.attacks.square(
        model, x[rows], y[rows], eps={h.INF: 0.03, 2: 0.25, 1: 1.0}[norm], norm=norm, queries=80, seed=9,
        first_example=first, return_details=True,
    )  # fmt: skip
    together = call(slice(None), 0)
    assert bool(together.fooled.any()) and not bool(together.fooled.all())
    for b in range(6):
        alone = call(slice(b, b + 1), b)
        assert torch.equal(alone.adv[0], together.adv[b]) and alone.fooled[0] == together.fooled[b]
    assert not any(model.grad_mode)
    with pytest.raises(ValueError, match="model: returned logits without a gradient"):
        fr.attacks.apgd(model, x, y, eps=0.1, steps=2)


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("clip", [(0.0, 1.0), None])
def test_square_ball_box_and_verdicts(norm: float, clip: Any) -> None:
    x, y = h.digits_batch(32)
    eps = h.RADIUS[norm] * torch.tensor([0, 0.5, 1, 2] * 8, dtype=torch.float64)
    model = h.digits_model()
    found = fr.attacks.square(model, x, y, eps=eps, norm=norm, clip=clip, queries=100, seed=1, return_details=True)
    h.assert_inside(found.adv, x, eps, norm, clip)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert int(found.fooled.sum()) > int((model(x).argmax(1) != y).sum())
    margins = fr.ops.margin_loss(model(found.adv), y).value
    assert torch.allclose(found.loss, margins, atol=1e-5)
    with torch.no_grad():
        assert bool((margins >= fr.ops.margin_loss(model(x), y).value - 1e-5)[eps > 0].all())


@pytest.mark.parametrize("norm", h.NORMS)
def test_square_towards_classes(norm: float) -> None:
    """Targeted: y is what the model shall say. With targets success is leaving y, and the margin of y is compared."""
    x, y = h.digits_batch(24)
    model, goal = h.digits_model(), (y + 3) % 10
    options = {"eps": 3 * h.RADIUS[norm], "norm": norm, "queries": 80, "seed": 2, "return_details": True}
    found = fr.attacks.square(model, x, goal, targeted=True, **options)
    h.assert_inside(found.adv, x, options["eps"], norm, (0.0, 1.0))
    outputs = model(found.adv)
    assert torch.equal(found.fooled, outputs.argmax(1) == goal) and bool(found.fooled.any())
    margins = -fr.ops.margin_loss(outputs, goal).value
    assert torch.allclose(found.loss, margins, atol=1e-5)
    assert bool((margins >= -fr.ops.margin_loss(model(x), goal).value - 1e-5).all())

    options["eps"] = h.RADIUS[norm]
    several = fr.attacks.square(model, x, y, targets=2, **options)
    h.assert_inside(several.adv, x, options["eps"], norm, (0.0, 1.0))
    outputs = model(several.adv)
    assert torch.equal(several.fooled, outputs.argmax(1) != y)
    assert torch.allclose(several.loss, fr.ops.margin_loss(outputs, y).value, atol=1e-5)
    first = model(x).scatter(1, y[:, None], -math.inf).argmax(1, keepdim=True)
    one = fr.attacks.square(model, x, y, targets=first, **options)
    assert bool((one.fooled <= several.fooled).all())  # the second target comes on top
    with pytest.raises(ValueError, match="targets: got a multi-targeted attack together with targeted=True"):
        fr.attacks.square(model, x, y, targets=2, targeted=True, **options)
    with pytest.raises(ValueError, match="y: got None, expected the classes to reach"):
        fr.attacks.square(model, x, targeted=True, **options)


def test_square_schedule_is_the_papers() -> None:
    wanted = [(0, 1), (10, 1), (11, 2), (50, 2), (51, 4), (201, 8), (501, 16), (1001, 32), (2001, 64), (4001, 128)]
    for query, divisor in [*wanted, (6001, 256), (8001, 512), (9999, 512)]:
        assert share_at(query, 10000, 0.8, False) == 0.8 / divisor
        assert share_at(query // 10, 1000, 0.8, True) == share_at(query // 10 * 10, 10000, 0.8, False)


def test_square_windows_are_everywhere_and_fair() -> None:
    x, numbers = torch.zeros(4000, 2, 6, 5), torch.arange(4000)
    new = x.clone()
    square_propose(x, new, x - 1, x + 1, numbers, 4, NO_WINDOW, Window(0, 2, 2), None)
    written = new[:, 0] != 0
    assert bool((written.flatten(1).sum(1) == 4).all())
    corner = written.flatten(1).int().argmax(1)  # the first of a window's pixels
    counts = torch.bincount(corner // 5 * 4 + corner % 5, minlength=20)
    assert counts.shape == (20,) and counts.min().item() > 140  # 200 expected, the last row and column too
    assert abs(new[written[:, None].expand_as(new)].mean().item()) < 0.05


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("side", [1, 3, 5, 8])
def test_square_bumps(norm: float, side: int) -> None:
    """Two parts of opposite sign and unit norm together; highest in their middles."""
    for pattern in (bump(side, side, norm), bump(1, side, norm)):
        assert torch.linalg.vector_norm(pattern, norm).item() == pytest.approx(1)
        if side > 1:
            flat = pattern if pattern.shape[0] > 1 else pattern.T
            assert bool((flat[: side // 2] > 0).all()) and bool((flat[side // 2 :] < 0).all())
            assert flat[side // 4, flat.shape[1] // 2] == flat.max()


def _linear(n: int, classes: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n, classes)


def _distance(model: nn.Linear, x: Tensor, y: Tensor, norm: float) -> Tensor:
    """(B, K) exact distances to each class's half space in the box, in float64 by bisection over the multiplier."""
    w, b = model.weight.detach().double(), model.bias.detach().double()
    far = torch.full((len(x), len(w)), math.inf, dtype=torch.float64)
    for i, row in enumerate(x.double()):
        for c in range(len(w)):
            if c == int(y[i]):
                continue
            a, gap = w[c] - w[int(y[i])], float((w[int(y[i])] - w[c]) @ row + b[int(y[i])] - b[c])
            far[i, c] = _cheapest(a, gap, row, norm)
    return far


def _cheapest(a: Tensor, gap: float, x: Tensor, norm: float) -> float:
    room = torch.where(a > 0, 1 - x, x)
    if float((a.abs() * room).sum()) < gap:
        return math.inf
    if norm == 1:
        order = a.abs().argsort(descending=True)
        total = 0.0
        for j in order.tolist():
            gain = float(a[j].abs() * room[j])
            if gain >= gap:
                return total + gap / float(a[j].abs())
            gap, total = gap - gain, total + float(room[j])
        return total
    size: Callable[[float], Tensor] = (
        (lambda t: torch.minimum(room, torch.full_like(room, t)))
        if norm == h.INF
        else (lambda t: torch.minimum(room, t * a.abs()))
    )
    low, high = 0.0, 1.0
    while float((a.abs() * size(high)).sum()) < gap:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((a.abs() * size(middle)).sum()) < gap else (low, middle)
    return high if norm == h.INF else float(size(high).norm())


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("targets", [None, "all", 2])
def test_fab_finds_the_distance_of_a_linear_model(norm: float, targets: Any) -> None:
    """One hyperplane a class: the projection is the answer. Untargeted takes the nearest class."""
    model = _linear(12, 4)
    x = torch.rand(10, 12, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    found = fr.attacks.fab(model, x, y, norm=norm, steps=30, targets=targets, return_details=True)
    far = _distance(model, x, y, norm)
    if targets == 2:
        likeliest = model(x).detach().scatter(1, y[:, None], -math.inf).topk(2, 1).indices
        far = far.gather(1, likeliest)
    wanted = far.amin(1)
    reached = wanted < math.inf
    assert int(reached.sum()) >= 8
    ours = h.distance(found.adv, x, norm)
    assert bool((ours[reached] >= wanted[reached] * (1 - 1e-5)).all())
    # the overshoot eta; untargeted FAB chooses the class by distances that know no box, which may not be the nearest
    assert bool((ours[reached] <= wanted[reached] * (1.15 if targets is None else 1.06)).all())
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert torch.equal(found.fooled[reached], torch.ones(int(reached.sum()), dtype=torch.bool))
    assert torch.allclose(-found.loss[found.fooled].double(), ours[found.fooled], rtol=1e-5)
    assert float(found.adv.detach().min()) >= 0 and float(found.adv.detach().max()) <= 1


def test_fab_alone_goes_for_its_targets() -> None:
    """With targets the boundary to the target is the one that is looked at."""
    model = _linear(12, 4)
    x = torch.rand(10, 12, generator=torch.Generator().manual_seed(1))
    z = model(x).detach()
    y, last = z.argmax(1), z.argmin(1)
    found = fr.attacks.fab(model, x, y, norm=2, steps=1, targets=last[:, None], return_details=True)
    ended = model(found.adv).argmax(1)
    assert bool((ended[found.fooled] == last[found.fooled]).float().mean() >= 0.5)
    assert bool(found.fooled.any())


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("options", [{}, {"targets": 2}, {"restarts": 2}, {"early_stop": False}], ids=str)
def test_fab_ball_box_and_verdicts(norm: float, options: dict[str, Any]) -> None:
    x, y = h.digits_batch(16)
    model = h.digits_model()
    eps = h.RADIUS[norm] * torch.tensor([0, 0.5, 1, 2] * 4, dtype=torch.float64)
    found = fr.attacks.fab(model, x, y, eps=eps, norm=norm, steps=10, seed=0, return_details=True, **options)
    h.assert_inside(found.adv, x, eps, norm)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert torch.equal(found.adv[~found.fooled], x[~found.fooled])
    assert bool(found.fooled[eps > 0].any())


def test_fab_early_stop_leaves_with_a_point_that_fools() -> None:
    x, y = h.digits_batch(40)
    watch = h.Watch(h.digits_model())
    first = fr.attacks.fab(watch, x, y, eps=0.15, steps=15, targets=3, return_details=True)
    assert watch.sizes[-1] < watch.sizes[1]
    best = fr.attacks.fab(watch, x, y, eps=0.15, steps=15, targets=3, early_stop=False, return_details=True)
    assert bool((best.fooled >= first.fooled).all())
    assert bool((best.loss >= first.loss - 1e-6).all())  # never further away


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"eta": -1}, ValueError, "eta: got"),
        ({"alpha_max": 2}, ValueError, "alpha_max: got"),
        ({"beta": "x"}, TypeError, "beta: got"),
        ({"steps": 0}, ValueError, "steps: got 0"),
        ({"eps": torch.zeros(3, 1, 8, 8)}, ValueError, "eps: got one value per element"),
    ],
    ids=lambda v: h.label(v)[:30],
)
def test_fab_bad_input(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    x, y = h.digits_batch(3)
    with pytest.raises(error, match=text):
        fr.attacks.fab(h.digits_model(), x, y, **{"eps": 0.1, **bad})


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"queries": 0}, ValueError, "queries: got 0"),
        ({"share": 2}, ValueError, "share: got"),
        ({"loss": "dlr"}, ValueError, "loss: got 'dlr'"),
    ],
    ids=str,
)
def test_square_bad_input(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    x, y = h.digits_batch(3)
    with pytest.raises(error, match=text):
        fr.attacks.square(h.digits_model(), x, y, eps=0.1, **bad)
