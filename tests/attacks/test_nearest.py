"""Carlini & Wagner's attacks and DeepFool against float64 loops and against models whose answer is known."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr


def _margin(z: Tensor, y: Tensor, reduction: str = "sum") -> Tensor:
    other = z.scatter(1, y[:, None], -math.inf).amax(1)
    return (other - z.gather(1, y[:, None])[:, 0]).sum()


def _double() -> nn.Module:
    return copy.deepcopy(h.digits_model()).double()


def _right(n: int) -> tuple[Tensor, Tensor]:
    x, y = h.digits_batch(3 * n)
    keep = (h.digits_model()(x).argmax(1) == y).nonzero()[:n, 0]
    return x[keep], y[keep]


def _linear(classes: int, n: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(n, classes)).eval()


# ---- C&W-inf ----


def test_cw_inf_is_thirty_steps_of_pgd_on_the_margin() -> None:
    x, y = h.digits_batch(40)
    model = h.digits_model()
    adv = fr.attacks.cw_inf(model, x, y, eps=0.1, seed=4)
    assert torch.equal(adv, fr.attacks.pgd(model, x, y, eps=0.1, steps=30, loss="margin", seed=4))
    h.assert_inside(adv, x, 0.1, h.INF)
    short = fr.attacks.cw_inf(model, x, y, eps=0.1, steps=5, step_size=0.03, random_start=False)
    plain = h.plain_pgd(_double(), x, y, x, 0.1, 0.03, 5, h.INF, _margin)[-1]
    assert (short - plain).abs().gt(1e-5).double().mean() < 0.01  # signs of gradients near zero may differ
    with pytest.raises(TypeError, match="loss: got one"):
        fr.attacks.cw_inf(model, x, y, eps=0.1, loss="ce")  # type: ignore[call-overload]


# ---- C&W-L2 ----


def _plain_cw(
    model: nn.Module, x: Tensor, y: int, steps: int, searches: int, c: float, lr: float, kappa: float, sign: float
) -> tuple[float, Tensor]:  # fmt: skip
    """One example in float64, line by line: the nearest point that fools, and its distance."""
    best, point, low, high = math.inf, x, 0.0, math.inf
    for _ in range(searches):
        here, m, v, before, found = x.clone(), torch.zeros_like(x), torch.zeros_like(x), math.inf, False
        for k in range(steps + 1):
            leaf = here.clone().requires_grad_()
            z = model(leaf[None])[0]
            said = z.tolist()
            other = max(said[i] for i in range(len(said)) if i != y)
            lead = other - said[y] if sign < 0 else said[y] - other
            distance = float((here - x).norm())
            if lead > kappa or (lead == kappa and kappa > 0):
                found = True
                if distance < best:
                    best, point = distance, here.clone()
            if k == steps:
                break
            loss = -sign * _margin(z[None], torch.tensor([y]))
            loss = torch.clamp(-loss, min=-kappa)
            cost = (leaf - x).square().sum() + c * loss
            if k % max(steps // 10, 1) == 0:
                if k and not cost.item() <= before - 1e-4 * abs(before):
                    break
                before = cost.item()
            (g,) = torch.autograd.grad(cost, leaf)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            here = (here - lr * (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)).clamp(0, 1)
        if found:
            high = min(high, c)
        else:
            low = max(low, c)
        c = (low + high) / 2 if high < math.inf else 10 * c
    return best, point


@pytest.mark.parametrize(("kappa", "targeted"), [(0.0, False), (1.0, False), (0.0, True)])
def test_cw_l2_follows_a_float64_loop(kappa: float, targeted: bool) -> None:
    x, y = _right(6)
    goal = (y + 3) % 10 if targeted else y
    found = fr.attacks.cw_l2(
        h.digits_model(), x, goal, steps=40, searches=5, c=0.05, lr=0.02, confidence=kappa, targeted=targeted,
        return_details=True,
    )  # fmt: skip
    model, sign = _double(), 1.0 if targeted else -1.0
    plain = [_plain_cw(model, a.double(), int(b), 40, 5, 0.05, 0.02, kappa, sign) for a, b in zip(x, goal, strict=True)]
    assert bool(found.fooled.all()) and all(d < math.inf for d, _ in plain)
    wanted = torch.tensor([d for d, _ in plain])
    assert torch.allclose(-found.loss, wanted, rtol=2e-3)
    assert torch.allclose(found.adv.double(), torch.stack([p for _, p in plain]), atol=0.02)


def test_cw_l2_verdicts_distances_box_and_confidence() -> None:
    x, y = h.digits_batch(40)
    model = h.digits_model()
    wrong = model(x).argmax(1) != y
    for kappa in (0.0, 2.0):
        found = fr.attacks.cw_l2(
            model, x, y, steps=60, searches=4, c=0.1, lr=0.02, confidence=kappa, return_details=True
        )
        with torch.no_grad():
            lead = fr.ops.margin_loss(model(found.adv), y).value
        assert torch.equal(found.fooled, model(found.adv).argmax(1) != y) or kappa > 0
        assert bool((lead[found.fooled] >= kappa - 1e-5).all()) and int(found.fooled.sum()) > 30
        assert torch.equal(found.adv[~found.fooled], x[~found.fooled])
        assert found.adv.min().item() >= 0 and found.adv.max().item() <= 1
        exact = h.distance(found.adv, x, 2)[found.fooled]
        assert torch.allclose(-found.loss[found.fooled].double(), exact, atol=1e-6)
        assert bool((found.loss[~found.fooled] == -math.inf).all())
        if not kappa:
            assert torch.equal(found.adv[wrong], x[wrong]) and bool(found.fooled[wrong].all())
    near = fr.attacks.cw_l2(model, x, y, steps=60, searches=4, c=0.1, lr=0.02, eps=0.4, return_details=True)
    h.assert_inside(near.adv, x, 0.4, 2)
    assert 0 < int(near.fooled.sum()) < 40


def test_cw_l2_finds_what_fab_finds() -> None:
    """Both look for the same smallest distance; neither shares a line with the other's search."""
    x, y = _right(24)
    model = h.digits_model()
    ours = fr.attacks.cw_l2(model, x, y, steps=150, searches=6, c=0.1, return_details=True)
    fab = fr.attacks.fab(model, x, y, norm=2, steps=60, seed=0, return_details=True)
    assert bool(ours.fooled.all() & fab.fooled.all())
    ratio = ours.loss / fab.loss  # both are local searches: now and then one finds another boundary
    assert 0.97 < ratio.median().item() < 1.03 and (ratio - 1).abs().lt(0.15).sum().item() >= 20


def _black_and_white(n: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    model = _linear(3, 24)
    x = torch.rand(n, 1, 4, 6, generator=torch.Generator().manual_seed(5)).round()
    return model, x, model(x).argmax(1)


def _nearest_linear(model: nn.Module, x: Tensor, y: Tensor, norm: float, box: bool = True) -> list[float]:
    """The exact distance to the other classes of a linear model, by float64 code of its own."""
    weight, bias = model[1].weight.double().detach().numpy(), model[1].bias.double().detach().numpy()  # type: ignore[index]
    out = []
    for row, label in zip(x.flatten(1).double().numpy(), y.tolist(), strict=True):
        best = math.inf
        for k in range(len(bias)):
            if k == label:
                continue
            w = weight[k] - weight[label]
            gap = float(w @ row + bias[k] - bias[label])
            best = min(best, _reach(w, -gap, -row, 1 - row, norm) if box else -gap / _dual(w, norm))
        out.append(best)
    return out


def _dual(w: np.ndarray[Any, Any], norm: float) -> float:
    return float(np.abs(w).sum() if norm == math.inf else np.abs(w).max() if norm == 1 else np.sqrt((w * w).sum()))


def _reach(
    w: np.ndarray[Any, Any], need: float, low: np.ndarray[Any, Any], high: np.ndarray[Any, Any], norm: float
) -> float:
    """min |d| with w.d >= need inside low <= d <= high, by bisection or by filling the steepest first."""
    room = np.where(w > 0, high, -low)
    if norm == 1:
        spent = 0.0
        for i in np.argsort(-np.abs(w)):
            gain = abs(w[i]) * room[i]
            if gain >= need:
                return spent + need / abs(w[i])
            need, spent = need - gain, spent + room[i]
        return math.inf
    move = lambda t: np.minimum(t if norm == math.inf else t * np.abs(w), room)
    if np.abs(w) @ room < need:
        return math.inf
    a, b = 0.0, 1e9
    for _ in range(200):
        t = (a + b) / 2
        a, b = (a, t) if np.abs(w) @ move(t) >= need else (t, b)
    return float(move(b).max() if norm == math.inf else np.sqrt((move(b) ** 2).sum()))


def test_cw_l2_does_not_freeze_black_and_white_pixels() -> None:
    """torchattacks' change of variables has an infinite start and no gradient there: nothing moves."""
    model, x, y = _black_and_white()
    found = fr.attacks.cw_l2(model, x, y, steps=200, searches=6, c=0.1, return_details=True)
    exact = torch.tensor(_nearest_linear(model, x, y, 2), dtype=torch.float64)
    assert bool(found.fooled.all())
    assert bool((-found.loss >= exact * (1 - 1e-5)).all()) and bool((-found.loss <= exact * 1.05).all())
    theirs = pytest.importorskip("torchattacks").CW(model, c=1, steps=200)(x, y)
    assert torch.equal(theirs, x)


def test_cw_l2_aborts_for_each_example_alone() -> None:
    """A cost that jumps about in one example ends the batch in torchattacks; here each goes on as it does alone."""

    class Two(nn.Module):
        """The first pixel decides which model an image sees: a gentle slope, or a sawtooth that no step size suits."""

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            rough = 1.5 + torch.sin(400 * flat[:, 1:]).sum(1)
            gentle = 1 - flat[:, 1:].sum(1) / 5
            lead = torch.where(flat[:, 0] > 0.5, rough, gentle)
            return torch.stack([lead, torch.zeros_like(lead)], 1)

    x = torch.full((4, 1, 3, 3), 0.4)
    x[:, :, 0, 0] = torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]
    x[1:] += 0.01 * torch.arange(1, 4)[:, None, None, None] * (x[1:] < 0.9) * (x[1:] > 0.1)
    y = torch.zeros(4, dtype=torch.long)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 0, 0] = False
    call = lambda rows, **o: fr.attacks.cw_l2(
        Two(), x[rows], y[rows], steps=50, searches=3, c=1.0, lr=0.02, mask=mask, return_details=True, check=False, **o
    )
    together = call(slice(None))
    for b in range(4):
        alone = call(slice(b, b + 1))
        assert torch.equal(alone.adv[0], together.adv[b]) and alone.loss[0] == together.loss[b]
    assert bool(together.fooled[[1, 3]].all())


# ---- DeepFool ----


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("box", [True, False])
def test_deepfool_is_exact_on_linear_models(norm: float, box: bool) -> None:
    x = torch.rand(20, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    x[:8] = x[:8].round()  # on the box's faces
    for model in (_linear(4, 24), _linear(2, 24, 8)):
        y = model(x).argmax(1)
        found = fr.attacks.deepfool(
            model, x, y, norm=norm, steps=1, overshoot=1e-4, clip=(0, 1) if box else None, return_details=True
        )
        exact = torch.tensor(_nearest_linear(model, x, y, norm, box), dtype=torch.float64)
        reach = exact < math.inf
        assert bool(reach.any()) and torch.equal(found.fooled, reach)
        distance = h.distance(found.adv, x, norm)[reach]
        assert bool((distance >= exact[reach] * (1 - 1e-6)).all())
        assert torch.allclose(distance, exact[reach], rtol=3e-4, atol=2e-6)
        assert found.queries == 4  # clean, one step, its verdict, and the one on what is handed back


def _plain_deepfool(model: nn.Module, x: Tensor, y: int, norm: float, steps: int, eta: float) -> tuple[Tensor, int]:
    """Algorithm 2 of the paper, one example in float64, without a box."""
    here = x.clone()
    for step in range(steps):
        leaf = here.clone().requires_grad_()
        z = model(leaf[None])[0]
        if int(z.argmax()) != y:
            return here, step
        rows = [torch.autograd.grad(z[k], leaf, retain_graph=True)[0] for k in range(len(z))]
        best, move = math.inf, here
        for k in range(len(z)):
            if k == y:
                continue
            w, f = rows[k] - rows[y], abs((z[k] - z[y]).item())
            size = float(w.abs().sum() if norm == math.inf else w.norm() if norm == 2 else w.abs().max())
            if f / size < best:
                best = f / size
                if norm == 2:
                    move = f * w / size**2
                elif norm == math.inf:
                    move = f / size * w.sign()
                else:
                    move = torch.zeros_like(w).flatten()
                    at = int(w.abs().flatten().argmax())
                    move[at] = f / w.flatten()[at]
                    move = move.view_as(w)
        here = here + (1 + eta) * move
    return here, steps


@pytest.mark.parametrize("norm", h.NORMS)
def test_deepfool_follows_the_papers_algorithm(norm: float) -> None:
    x, y = _right(30)  # some of them take several steps, whatever the digits model has learnt
    found = fr.attacks.deepfool(h.digits_model(), x, y, norm=norm, clip=None, return_details=True)
    model, several = _double(), 0
    for b in range(len(x)):
        plain, steps = _plain_deepfool(model, x[b].double(), int(y[b]), norm, 50, 0.02)
        several += steps > 1
        assert torch.allclose(found.adv[b].double(), plain, atol=2e-4), (b, (found.adv[b] - plain).abs().max())
    assert several >= 2


def test_deepfool_walks_along_the_box_where_others_stand_still() -> None:
    """A step that points out of the box and is clamped makes no way: torchattacks' DeepFool leaves half of the
    digits."""
    x, y = h.digits_batch(40)
    model = h.digits_model()
    found = fr.attacks.deepfool(model, x, y, return_details=True)
    assert bool(found.fooled.all()) and torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert found.adv.min().item() >= 0 and found.adv.max().item() <= 1
    theirs = pytest.importorskip("torchattacks").DeepFool(model, steps=20)(x[:10], y[:10])
    assert int((model(theirs).argmax(1) != y[:10]).sum()) < 10


def test_deepfool_candidates_labels_and_ties() -> None:
    x, y = _right(10)
    watch = h.Watch(h.digits_model())
    every = fr.attacks.deepfool(watch, x, y, norm="Linf")
    assert torch.equal(every, fr.attacks.deepfool(watch, x, norm=math.inf, candidates=9))
    few = fr.attacks.deepfool(h.digits_model(), x, y, candidates=1)
    assert not torch.equal(few, fr.attacks.deepfool(h.digits_model(), x, y))
    flat = _linear(3, 4)
    with torch.no_grad():
        flat[1].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]))
        flat[1].bias.zero_()
    tie, zero = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.long)
    found = fr.attacks.deepfool(flat, tie, zero, return_details=True)
    assert bool(found.fooled.all()) and 0 < -found.loss.item() < 1e-5
    sizes = []
    watch.sizes.clear()
    fr.attacks.deepfool(watch, x, y)
    sizes = [n for n in watch.sizes if n < 10]
    assert sizes and sizes == sorted(sizes, reverse=True) or watch.sizes[-1] == 10


# ---- all of them ----

_CALLS: dict[str, Callable[..., Any]] = {
    "cw_inf": lambda *a, **o: fr.attacks.cw_inf(*a, eps=0.1, steps=4, **o),
    "cw_l2": lambda *a, **o: fr.attacks.cw_l2(*a, steps=8, searches=2, c=1.0, lr=0.05, **o),
    "deepfool": fr.attacks.deepfool,
    "malt": lambda *a, **o: fr.attacks.malt(*a, eps=0.1, targets=2, steps=4, seed=0, **o),
}


@pytest.mark.parametrize("name", sorted(_CALLS))
def test_nothing_else_is_touched(name: str) -> None:
    x, y = h.digits_batch(8)
    model = copy.deepcopy(h.digits_model()).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    options = {"seed": 0} if name == "cw_inf" else {}
    rng, given = torch.get_rng_state(), x.clone()
    with torch.inference_mode():
        adv = _CALLS[name](model, x, y, **options)
    assert torch.equal(torch.get_rng_state(), rng) and torch.equal(x, given)
    assert not adv.requires_grad and not torch.equal(adv, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags and all(p.grad is None for p in model.parameters())

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.calls = model, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return self.model(x)

    with pytest.raises(KeyboardInterrupt):
        _CALLS[name](Breaks().train(), x, y, check=False, **options)
    assert [m.training for m in model.modules()] != [False] * len(flags) and model[0].training


@pytest.mark.parametrize("name", sorted(_CALLS))
def test_doubts_are_said(name: str, recwarn: pytest.WarningsRecorder) -> None:
    x, y = _right(8)
    model = h.digits_model()
    _CALLS[name](model, x, y)
    assert not recwarn.list
    cases: list[tuple[Callable[[Tensor], Tensor], str]] = [
        (lambda t: model(t.detach() + t.round() * 0), "gradient of 8 of 8 examples .* zero or NaN"),
        (lambda t: model(t).softmax(1), "as after softmax"),
        (lambda t: model(t + 0.01 * torch.randn_like(t)), "two different outputs"),
    ]
    for bad, text in cases:
        with pytest.warns(fr.attacks.AttackWarning, match=text):
            _CALLS[name](bad, x, y)


@pytest.mark.parametrize("name", sorted(_CALLS))
def test_odd_batches(name: str) -> None:
    model = h.digits_model()
    x, y = h.digits_batch(6)
    empty = _CALLS[name](model, x[:0], y[:0], return_details=True)
    assert empty.adv.shape == (0, 1, 8, 8) and empty.fooled.shape == (0,)
    one = _CALLS[name](model, x[:1], y[:1], return_details=True)
    assert one.adv.shape == (1, 1, 8, 8)
    wrong = (model(x).argmax(1) + 1) % 10
    if name != "cw_inf":
        found = _CALLS[name](model, x, wrong, return_details=True)
        assert bool(found.fooled.all()) and torch.equal(found.adv, x)
    half = _CALLS[name](model, x.half(), y, return_details=True)
    assert half.adv.dtype == torch.float16
    assert torch.equal(half.fooled, model(half.adv.float()).argmax(1) != y)
    table = nn.Linear(64, 4)
    found = _CALLS[name](table, x.flatten(1), y % 4, return_details=True)
    assert found.adv.shape == (6, 64)
    patch = torch.zeros(8, 8, dtype=torch.bool)
    patch[2:7, 2:7] = True
    masked = _CALLS[name](model, x, y, mask=patch)
    assert torch.equal(masked[..., ~patch], x[..., ~patch]) and not torch.equal(masked, x)
    scaled = _CALLS[name](model, x, y, normalize=(0.5, 0.25), return_details=True)
    assert torch.equal(scaled.fooled, model((scaled.adv - 0.5) / 0.25).argmax(1) != y)


@pytest.mark.parametrize(
    ("call", "bad", "error", "text"),
    [
        ("cw_l2", {"c": 0}, ValueError, "c: got 0"),
        ("cw_l2", {"lr": -1}, ValueError, "lr: got -1"),
        ("cw_l2", {"searches": 0}, ValueError, "searches: got 0"),
        ("cw_l2", {"confidence": "x"}, TypeError, "confidence"),
        ("cw_l2", {"y": None, "targeted": True}, ValueError, "y: got None"),
        ("cw_l2", {"eps": -1}, ValueError, "eps: got"),
        ("deepfool", {"norm": 3}, ValueError, "norm"),
        ("deepfool", {"steps": 0}, ValueError, "steps: got 0"),
        ("deepfool", {"candidates": 0}, ValueError, "candidates: got 0"),
        ("deepfool", {"overshoot": -0.1}, ValueError, "overshoot: got"),
        ("malt", {"eps": 0.1, "targets": 0}, ValueError, "targets: got 0"),
        ("malt", {"eps": 0.1, "loss": "kl"}, ValueError, "loss: got 'kl'"),
        ("malt", {"eps": 0.1, "y": None}, ValueError, "y: got None"),
        ("malt", {"eps": 0.1, "step_size": 1}, TypeError, "'step_size'"),
    ],
    ids=str,
)
def test_bad_input(call: str, bad: dict[str, Any], error: type[Exception], text: str) -> None:
    x, y = h.digits_batch(3)
    options = {"y": y, **bad}
    with pytest.raises(error, match=text):
        getattr(fr.attacks, call)(h.digits_model(), x, **options)
