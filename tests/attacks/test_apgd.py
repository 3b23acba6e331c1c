"""Auto-PGD against algorithm 1 of its paper, written line by line in float64, and what every attack promises."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import _ascent, _run

EPS = {h.INF: 0.08, 2: 0.5, 1: 1.5}


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _projected(z: Tensor, x0: Tensor, eps: float, norm: float) -> Tensor:
    d = z - x0
    if norm == h.INF:
        return (x0 + d.clamp(-eps, eps)).clamp(0, 1)
    if norm == 1:
        return h.l1_project(z, x0, eps)
    return (x0 + d * min(1.0, eps / max(float(d.norm()), 1e-300))).clamp(0, 1)


def _ascended(x: Tensor, g: Tensor, eta: float, norm: float) -> Tensor:
    return x + eta * (g.sign() if norm == h.INF else g / max(float(g.norm()), 1e-300))


def _algorithm_1(
    model: nn.Module, x0: Tensor, y: Tensor, start: Tensor, eps: float, norm: float, steps: int
) -> tuple[float, int]:
    """One example. The best loss (among points that fool, if there are any), and how often the step was halved."""

    def look(x: Tensor) -> tuple[float, Tensor, bool]:
        leaf = x.clone().requires_grad_()
        z = model(leaf)
        loss = F.cross_entropy(z, y)
        (g,) = torch.autograd.grad(loss, leaf)
        return loss.item(), g, bool(z.argmax(1) != y)

    share = [0.0, 0.22]
    while share[-1] < 1:
        share.append(share[-1] + max(share[-1] - share[-2] - 0.03, 0.06))
    checks = {math.ceil(p * steps - 1e-9) for p in share[1:]}
    x = previous = start
    value, g, hit = look(x)
    top, x_top, g_top, found = value, x, g, (hit, value)
    eta, last, halved, ups, halvings = 2 * eps, 0, False, 0, 0
    top_there = top
    for k in range(steps):
        z = _projected(_ascended(x, g, eta, norm), x0, eps, norm)
        new = z if k == 0 else _projected(x + 0.75 * (z - x) + 0.25 * (x - previous), x0, eps, norm)
        previous, x = x, new
        before = value
        value, g, hit = look(x)
        ups += value > before
        found = max(found, (hit, value))
        if value > top:
            top, x_top, g_top = value, x, g
        if k + 1 in checks and k + 1 < steps:
            halve = ups < 0.75 * (k + 1 - last) or (not halved and top == top_there)
            if halve:
                eta, x, g, value, halvings = eta / 2, x_top, g_top, top, halvings + 1
            last, halved, ups, top_there = k + 1, halve, 0, top
    return found[1], halvings


@pytest.mark.parametrize("norm", [h.INF, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_follows_algorithm_1(norm: float, dtype: torch.dtype) -> None:
    """From equal starts the best losses agree, example by example."""
    x, y = h.digits_batch(12)
    model, wide, eps, steps = h.digits_model(), _double(h.digits_model()), EPS[norm], 30
    x = x.to(dtype)
    start = fr.ops.project(fr.ops.random_start(x, eps, norm, None, seed=5), x, eps, norm)
    found = fr.attacks.apgd(
        wide if dtype == torch.float64 else model, x, y, eps=eps, norm=norm, steps=steps, seed=5, early_stop=False,
        return_details=True,
    )  # fmt: skip
    rows = [
        _algorithm_1(wide, x[b : b + 1].double(), y[b : b + 1], start[b : b + 1].double(), eps, norm, steps)
        for b in range(len(x))
    ]
    wanted = torch.tensor([loss for loss, _ in rows], dtype=torch.float64)
    assert sum(halvings for _, halvings in rows) > len(x)  # the rules were in play
    gap = (found.loss.double() - wanted).abs() / (1e-3 + wanted.abs())
    # float32 may take a rise of 1e-7 for a fall and halve elsewhere
    assert gap.median().item() <= (1e-5 if dtype == torch.float64 else 1e-3), gap
    assert (gap > 1e-2).double().mean().item() <= (0.0 if dtype == torch.float64 else 0.2), gap


def _sparse_ascent(model: nn.Module, x0: Tensor, y: Tensor, eps: float, steps: int) -> float:
    """Norm 1, one example, from x0: Croce & Hein 2021, algorithm 1 with the sparsity rule of section 4.2."""

    def look(x: Tensor) -> tuple[float, Tensor, bool]:
        leaf = x.clone().requires_grad_()
        z = model(leaf)
        loss = F.cross_entropy(z, y)
        (g,) = torch.autograd.grad(loss, leaf)
        return loss.item(), g, bool(z.argmax(1) != y)

    n = x0.numel()
    x, every = x0, max(int(0.04 * steps), 1)
    value, g, hit = look(x)
    top, x_top, g_top, found = value, x, g, (hit, value)
    eta, keep, support = eps, n - int(0.8 * n), n
    for k in range(steps):
        least = g.abs().flatten().sort(descending=True).values[keep - 1]
        direction = g.sign() * (g.abs() >= least)
        x = _projected(x + eta * direction / max(float(direction.abs().sum()), 1.0), x0, eps, 1)
        value, g, hit = look(x)
        found = max(found, (hit, value))
        if value > top:
            top, x_top, g_top = value, x, g
        if (k + 1) % every == 0 and k + 1 < steps:
            now = int((x_top != x0).sum())
            sparser = now / support < 0.95
            eta = eps if sparser else max(eta / 1.5, eps / 10)
            keep = n - min(max(int((1 - now / (1.5 * n)) * n), 0), n - 1)
            support = now
            if sparser:
                x, g, value = x_top, g_top, top
    return found[1]


def test_norm_1_follows_its_paper() -> None:
    x, y = h.digits_batch(12)
    wide, x = _double(h.digits_model()), x.double()
    found = fr.attacks.apgd(
        wide, x, y, eps=1.5, norm=1, steps=30, random_start=False, early_stop=False, return_details=True
    )
    wanted = torch.tensor(
        [_sparse_ascent(wide, x[b : b + 1], y[b : b + 1], 1.5, 30) for b in range(12)], dtype=torch.float64
    )
    gap = (found.loss - wanted).abs() / (1e-3 + wanted.abs())
    assert gap.median().item() <= 1e-5 and (gap > 0.05).double().mean().item() <= 0.2, gap


def test_checkpoints_are_the_papers() -> None:
    assert _ascent.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert _ascent.checkpoints(10) == [3, 5, 6, 7, 8, 9, 10]
    assert _ascent.checkpoints(0) == [0]


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"early_stop": False},
        {"loss": "dlr", "targets": 2},
        {"restarts": 2, "random_start": False},
        {"loss": "kl"},
        {"eps": "each"},
        {"loss": "margin", "targets": "all"},
        {"clip": None},
    ],
    ids=str,
)
def test_ball_box_and_verdicts(norm: float, options: dict[str, Any]) -> None:
    x, y = h.digits_batch(16)
    options = dict(options)
    eps: Any = EPS[norm]
    if options.pop("eps", None):
        eps = EPS[norm] * torch.tensor([0, 0.2, 1, 2] * 4, dtype=torch.float64)
    model = h.digits_model()
    found = fr.attacks.apgd(model, x, y, eps=eps, norm=norm, steps=8, seed=1, return_details=True, **options)
    h.assert_inside(found.adv, x, eps, norm, options.get("clip", (0.0, 1.0)))
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert bool(found.fooled.any()) and not bool(found.fooled.all())


@pytest.mark.parametrize("norm", h.NORMS)
def test_stronger_than_pgd(norm: float) -> None:
    x, y = h.digits_batch(120)
    model, eps = h.digits_model(), h.RADIUS[norm]
    more: dict[str, Any] = {"restarts": 3, "large_radii": True} if norm == 1 else {}
    ours = h.accuracy(model, fr.attacks.apgd(model, x, y, eps=eps, norm=norm, steps=40, seed=0, **more), y)
    pgd = h.accuracy(model, fr.attacks.pgd(model, x, y, eps=eps, norm=norm, steps=40, seed=0, keep="best"), y)
    assert ours <= pgd + 1.0


def test_large_radii_end_in_the_ball() -> None:
    x, y = h.digits_batch(24)
    model = h.digits_model()
    watch = h.Watch(model)
    found = fr.attacks.apgd(watch, x, y, eps=1.5, norm=1, steps=10, large_radii=True, seed=0, return_details=True)
    h.assert_inside(found.adv, x, 1.5, 1)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert len(watch.sizes) == found.queries  # clean, 3 + 1, 3 + 1 and 4 + 1 steps
    assert found.queries <= 14


def test_fooled_examples_leave() -> None:
    x, y = h.digits_batch(64)
    model = h.digits_model()
    y[:5] = (y[:5] + 1) % 10  # wrong already
    wrong = int((model(x).argmax(1) != y).sum())
    watch = h.Watch(model)
    adv = fr.attacks.apgd(watch, x, y, eps=0.12, steps=20, seed=0)
    assert watch.sizes[0] == 64 and watch.sizes[1] == 64 - wrong
    assert watch.sizes[-1] < watch.sizes[1]
    assert all(a >= b for a, b in zip(watch.sizes, watch.sizes[1:], strict=False))
    assert torch.equal(adv[:5], x[:5])  # as they were


def test_targeted_is_targeted() -> None:
    """An attack towards a class never hands back the original where it says that it got there."""
    x, y = h.digits_batch(40)
    target, model = (y + 1) % 10, h.digits_model()
    found = fr.attacks.apgd(model, x, target, eps=0.3, targeted=True, steps=30, seed=0, return_details=True)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) == target)
    assert int(found.fooled.sum()) > 10


def test_loss_of_an_example_knows_no_other() -> None:
    """Summed or averaged losses would make an example's gradient, and its step, depend on the batch."""
    x, y = h.digits_batch(9)
    wide, x = _double(h.digits_model()), x.double()
    call = lambda rows, first: fr.attacks.apgd(wide, x[rows], y[rows], eps=0.08, steps=15, seed=3, first_example=first)
    together = call(slice(None), 0)
    assert (together[4:6] - call(slice(4, 6), 4)).abs().max().item() <= 1e-9
    order = torch.tensor([7, 2, 3, 0])
    assert (together[order] - call(order, order)).abs().max().item() <= 1e-9  # numbers of its own


def test_own_losses() -> None:
    x, y = h.digits_batch(8)
    model = h.digits_model()
    own = lambda z, t: F.cross_entropy(z, t, reduction="none")
    found = fr.attacks.apgd(model, x, y, eps=0.1, loss=own, steps=10, seed=0, return_details=True)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    with pytest.raises(ValueError, match="loss: returned one number, expected one value per example"):
        fr.attacks.apgd(model, x, y, eps=0.1, loss=lambda z, t: F.cross_entropy(z, t), steps=3)


@pytest.mark.parametrize("shape", [(20,), (3, 4), (2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("attack", ["apgd", "square", "fab"])
@pytest.mark.parametrize("norm", h.NORMS)
def test_any_shape(attack: str, norm: float, shape: tuple[int, ...]) -> None:
    """Tables, sequences and volumes, one example, two classes."""
    torch.manual_seed(1)
    x = torch.rand(1, *shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).eval()
    y = model(x).argmax(1)
    more = {"queries": 60} if attack == "square" else {"steps": 10}
    found = getattr(fr.attacks, attack)(model, x, y, eps=4.0, norm=norm, seed=0, return_details=True, **more)
    h.assert_inside(found.adv, x, 4.0, norm)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)


@pytest.mark.parametrize("attack", ["apgd", "square", "fab"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images(attack: str, dtype: torch.dtype) -> None:
    """They fool as they are handed back, after rounding."""
    x, y = h.digits_batch(24)
    model = h.digits_model()
    half = x.to(dtype)
    more = {"queries": 60} if attack == "square" else {"steps": 10}
    found = getattr(fr.attacks, attack)(model, half, y, eps=0.12, seed=0, return_details=True, **more)
    h.assert_inside(found.adv, half, 0.12, h.INF)
    assert torch.equal(found.fooled, model(found.adv.float()).argmax(1) != y)


@pytest.mark.parametrize("attack", ["apgd", "square", "fab"])
def test_masks(attack: str) -> None:
    x, y = h.digits_batch(12)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:7, 1:6] = True
    more = {"queries": 40} if attack == "square" else {"steps": 6}
    for norm in h.NORMS:
        adv = getattr(fr.attacks, attack)(
            h.digits_model(), x, y, eps=EPS[norm] * 4, norm=norm, mask=mask, seed=0, **more
        )
        assert torch.equal(adv[..., ~mask], x[..., ~mask])
        assert not torch.equal(adv, x)


@pytest.mark.parametrize("attack", ["apgd", "square", "fab"])
def test_empty_batches_and_nothing_to_do(attack: str) -> None:
    x, y = h.digits_batch(6)
    call, model = getattr(fr.attacks, attack), h.digits_model()
    assert call(model, x[:0], y[:0], eps=0.1).shape == (0, 1, 8, 8)
    wrong = (model(x).argmax(1) + 1) % 10
    found = call(model, x, wrong, eps=0.1, return_details=True)
    assert torch.equal(found.adv, x) and bool(found.fooled.all())
    assert torch.equal(
        call(model, x, y, eps=0.0, seed=0, **({"queries": 5} if attack == "square" else {"steps": 5})), x
    )


class _Breaks(nn.Module):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.body, self.left = copy.deepcopy(h.digits_model()), after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        found: Tensor = self.body(x)
        return found


@pytest.mark.parametrize("attack", ["apgd", "square", "fab", "autoattack"])
def test_nothing_is_left_behind(attack: str) -> None:
    """Modes, gradients, buffers, random state and tracing are what they were, also after Ctrl-C."""
    x, y = h.digits_batch(8)
    model = _Breaks(10**9).train()
    model.body[1].eval()
    flags = lambda: [m.training for m in model.modules()]
    before, state, was = copy.deepcopy(model.state_dict()), torch.get_rng_state(), flags()
    trace = sys.gettrace()
    more: dict[str, Any] = {
        "square": {"queries": 6},
        "autoattack": {"version": ["apgd-ce", ("square", {"queries": 5})]},
    }.get(attack, {"steps": 4})
    call = getattr(fr.attacks, attack)
    for left in (10**9, 3):
        model.left = left
        if left > 3:
            call(model, x, y, eps=0.1, seed=0, **more)
        else:
            with pytest.raises(KeyboardInterrupt):
                call(model, x, y, eps=0.1, seed=0, **more)
        assert flags() == was
        assert torch.equal(torch.get_rng_state(), state) and sys.gettrace() is trace
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("attack", ["apgd", "square", "fab"])
def test_normalize_is_a_wrapped_model(attack: str) -> None:
    x, y = h.digits_batch(8)
    model = h.digits_model()
    wrapped = lambda t: model((t - 0.4) / 0.3)
    more = {"queries": 20} if attack == "square" else {"steps": 6}
    call = lambda m, **o: getattr(fr.attacks, attack)(m, x, y, eps=0.1, seed=0, **more, **o)
    assert torch.equal(call(model, normalize=([0.4], [0.3])), call(wrapped))


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"rho": 2}, ValueError, "rho: got 2.0, expected"), ({"momentum": -1}, ValueError, "momentum: got"),
        ({"steps": 1.5}, TypeError, "steps: got"), ({"restarts": 0}, ValueError, "restarts: got 0"),
        ({"large_radii": True}, ValueError, "large_radii: got True for norm inf, expected norm 1"),
        ({"loss": "hinge"}, ValueError, "loss: got 'hinge'"), ({"norm": 3}, ValueError, "norm: got"),
        ({"first_example": [1, 2]}, ValueError, "first_example: got"), ({"targets": 0}, ValueError, "targets: got 0"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    x, y = h.digits_batch(3)
    with pytest.raises(error, match=text):
        fr.attacks.apgd(h.digits_model(), x, y, eps=0.1, **bad)


def test_overflow_of_a_summed_loss_under_autocast() -> None:
    """Logits of 1000 in half precision: a sum of losses over the batch would be inf, and every gradient NaN."""
    x, y = h.digits_batch(64)
    model = copy.deepcopy(h.digits_model())
    with torch.no_grad():
        model[-1].weight.mul_(300)
        model[-1].bias.mul_(300)
    found = fr.attacks.apgd(
        model, x, y, eps=0.12, steps=10, loss="dlr", autocast=torch.bfloat16, seed=0, return_details=True
    )
    assert bool(found.fooled.any()) and bool(torch.isfinite(found.loss).all())


@pytest.mark.parametrize("norm", [h.INF, 2, 1])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("name", ["apgd", "fab", "pgd"])
def test_runs_side_by_side_find_what_runs_in_turns_find(
    name: str, early_stop: bool, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = h.digits_model(), h.digits_batch(6)
    eps = {h.INF: 0.12, 2: 0.6, 1: 2.0}[norm]
    options: dict[str, Any] = {"eps": eps, "norm": norm, "steps": 8, "targets": 4, "seed": 3, "early_stop": early_stop}
    options |= {} if name == "fab" else {"loss": "dlr", "restarts": 2}
    call = getattr(fr.attacks, name)
    assert _run.abreast(6, 8) == 8 and _run.abreast(60, 8) == 1 and _run.abreast(20, 8) == 3 and _run.abreast(0, 3) == 3
    sizes: list[int] = []
    watched = lambda t: (sizes.append(len(t)), model(t))[1]
    abreast = call(watched, x, y, **options, return_details=True)
    assert max(sizes) > 6
    monkeypatch.setattr(_run, "ABREAST", 1)
    in_turns = call(model, x, y, **options, return_details=True)
    assert torch.equal(abreast.fooled, in_turns.fooled) and int(in_turns.fooled.sum()) > 0
    assert (abreast.adv - in_turns.adv).abs().max() < 1e-4
    torch.testing.assert_close(abreast.loss, in_turns.loss, rtol=1e-4, atol=1e-4)


def test_a_report_of_runs_side_by_side_counts_examples(recwarn: pytest.WarningsRecorder) -> None:
    model, (x, y) = h.digits_model(), h.digits_batch(5)
    y = model(x).argmax(1)
    fr.attacks.apgd(lambda t: model(t.detach() + t.round() * 0), x, y, eps=0.1, steps=3, targets=3, loss="dlr", seed=0)
    assert any("the gradient of 5 of 5 examples" in str(w.message) for w in recwarn.list)
