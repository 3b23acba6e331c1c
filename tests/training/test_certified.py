"""Certified losses against loops in float64, and methods on the digits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrobust as fr
from fastrobust import data
from fastrobust.bounds import compute_bounds
from fastrobust.training import Batch, Method, certified, train
from fastrobust.training.envelope import envelope_hinge, envelope_loss
from fastrobust.training.registry import METHODS

INPUTS, HIDDEN, CLASSES = 10, 14, 5


def network(seed=0, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(2)
        model[2].bias.sub_(model(torch.rand(100, INPUTS)).mean(0))
    return model.to(dtype)


def batch(count=8, dtype=torch.float32, **where) -> Batch:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, INPUTS, generator=generator).to(dtype)
    return Batch(x, torch.randint(CLASSES, (count,), generator=generator), **where)


def margins_by_hand(model, x, y, eps, method):
    """Lower bounds of the margins of one example of a network with one hidden layer and the lines (A, b), by the
    formulas of section 3.1 in float64; elided."""
    w, b, v, c = (model[i].get_parameter(n).detach().double() for i in (0, 2) for n in ("weight", "bias"))
    low, high = (x.double() - eps).clamp(min=0), (x.double() + eps).clamp(max=1)
    mid, reach = (low + high) / 2, (high - low) / 2
    l, u = w @ mid + b - w.abs() @ reach, w @ mid + b + w.abs() @ reach
    rows, found, lines = [i for i in range(CLASSES) if i != y], [], []
    for i in rows:
        d = v[y] - v[i]
        if method == "ibp":
            a_mid, a_reach = (u.relu() + l.relu()) / 2, (u.relu() - l.relu()) / 2
            found.append(d @ a_mid - d.abs() @ a_reach + c[y] - c[i])
            continue
        total, offset = torch.zeros(INPUTS, dtype=torch.float64), c[y] - c[i]
        for k in range(HIDDEN):
            slope = 1.0 if l[k] >= 0 else 0.0 if u[k] <= 0 else float(u[k] / (u[k] - l[k]))
            intercept = -slope * float(l[k]) if l[k] < 0 < u[k] and d[k] < 0 else 0.0
            if l[k] < 0 < u[k] and d[k] >= 0 and method == "crown":
                slope = 1.0 if u[k] > -l[k] else 0.0
            total = total + d[k] * slope * w[k]
            offset = offset + d[k] * (slope * b[k] + intercept)
        lines.append((total, offset))
        found.append(total @ mid - total.abs() @ reach + offset)
    return torch.stack(found), lines


def cross_entropy_by_hand(margins):
    return math.log1p(sum(math.exp(-float(m)) for m in margins))


@pytest.mark.parametrize(
    ("name", "lines"), (("kw", "fast-lin"), ("ibp", "ibp"), ("crown-ibp", "crown")), ids=("kw", "ibp", "crown-ibp")
)
@pytest.mark.parametrize("epoch", (0, 12, 25, 90))
def test_worst_case_losses_line_by_line(name, lines, epoch):
    """The value at several places of the schedules, each example on its own."""
    model, here = network(), batch(epoch=epoch, epochs=100)
    method = METHODS[name](0.08)
    progress = epoch / 100
    begin, end = method.ramp
    share = min(1.0, max(0.0, (progress - begin) / (end - begin)))
    eps = 0.08 * (method.start + (1 - method.start) * share)
    kappa = method.kappa[0] + (method.kappa[1] - method.kappa[0]) * share
    beta = method.beta[0] + (method.beta[1] - method.beta[0]) * share
    total = 0.0
    for x, y in zip(here.x, here.y.tolist(), strict=True):
        tight, _ = margins_by_hand(model, x, y, eps, lines)
        loose, _ = margins_by_hand(model, x, y, eps, "ibp")
        clean = float(F.cross_entropy(model(x[None]).detach().double(), torch.tensor([y])))
        worst = cross_entropy_by_hand(beta * tight + (1 - beta) * loose)
        total += kappa * clean + (1 - kappa) * worst
    found = method.loss(model, here, method.perturb(model, here))
    assert float(found.value.detach()) == pytest.approx(total / len(here.x), rel=2e-5)
    assert torch.equal(found.logits, model(here.x))
    assert found.metrics["eps"] == pytest.approx(eps)


def test_worst_case_of_outputs_is_3_1():
    """Not elided: the lower output of the label and the upper ones of the rest, as (3.1) is written."""
    model, here = network(), batch()
    bounds = compute_bounds(model, here.x, 0.05, clip=(0, 1), method="crown")
    expected = []
    for low, up, y in zip(bounds.lower, bounds.upper, here.y.tolist(), strict=True):
        worst = [low[i].item() if i == y else up[i].item() for i in range(CLASSES)]
        expected.append(-worst[y] + math.log(sum(math.exp(v) for v in worst)))
    options = {"clip": (0, 1), "method": "crown", "reduction": "none"}
    found = certified.worst_case_loss(model, here.x, here.y, 0.05, elide=False, **options)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert bool((certified.worst_case_loss(model, here.x, here.y, 0.05, **options) <= found + 1e-6).all())


@pytest.mark.parametrize("eps", (0.001, 0.05, 0.4))
def test_a_fused_loss_bounds_the_worst_case(eps):
    """Between every attack and ruin: not below the loss of any point, close at a small radius, capped by intervals."""
    model, here = network(), batch(40)
    options = {"clip": (0, 1), "reduction": "none"}
    fused = certified.fused_loss(model, here.x, here.y, eps, **options)
    assert bool((fused <= certified.worst_case_loss(model, here.x, here.y, eps, method="ibp", **options) + 1e-5).all())
    hit = fr.attacks.pgd(model, here.x, here.y, eps=eps, restarts=2, seed=0, check=False)
    assert bool((fused >= F.cross_entropy(model(hit), here.y, reduction="none") - 1e-5).all())
    if eps == 0.001:
        torch.testing.assert_close(
            fused, F.cross_entropy(model(here.x), here.y, reduction="none"), rtol=0.05, atol=0.02
        )
    large = nn.Sequential(*(nn.Linear(4, 3) for _ in range(1)))
    with torch.no_grad():
        large[0].weight.mul_(1e4)  # exponents that no float32 holds
    value = certified.fused_loss(large, torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1]), eps, clip=(0, 1))
    value.backward()
    assert bool(value.isfinite()) and bool(large[0].weight.grad.isfinite().all())


def hinge_by_hand(lines, at, alpha, count=4, norm=math.inf):
    """(3.20) with the rule of ``envelope_hinge`` for one example; distances by bisection on how far a row can be
    moved."""
    terms = []
    for total, offset in lines:
        margin = float(total @ at.double() + offset)
        size = total.abs() if margin > 0 else -total.abs()

        def moved(t, total=total, margin=margin):  # the margin where every coordinate goes t towards 0 inside the box
            way = -total.sign() if margin > 0 else total.sign()
            step = (
                torch.maximum(torch.minimum(at.double() + t * way, torch.tensor(1.0)), torch.tensor(0.0)) - at.double()
            )
            return margin + float(total @ step)

        low, high = 0.0, 1.0
        if moved(1.0) * margin > 0:
            inside = math.inf
        else:
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if moved(middle) * margin > 0 else (low, middle)
            inside = high
        signed = inside if margin > 0 else max(-inside, 2 * margin / float(size.abs().sum()), -10 * alpha)
        terms.append(signed)
    return sum(max(0.0, 1 - d / alpha) for d in sorted(terms)[:count])


@pytest.mark.parametrize("name", ("l-per", "l-per+at", "i-per", "i-per+at"))
@pytest.mark.parametrize("epoch", (0, 59, 99))
def test_per_line_by_line(name, epoch):
    """One hidden layer, where L- and I- lines are the same. eps doubles every fifth of the training."""
    model, here = network(), batch(epoch=epoch, epochs=100)
    method = METHODS[name](beta=0.7)
    eps = 0.0064 * 2 ** (epoch // 20)
    adv = method.perturb(model, here)
    if not method.at:
        assert adv is here.x
    else:
        assert float((adv - here.x).abs().max()) == pytest.approx(eps, rel=1e-4)
    total, terms = 0.0, []
    for x, x_, y in zip(here.x, adv, here.y.tolist(), strict=True):
        _, lines = margins_by_hand(model, x, y, eps, "fast-lin")
        terms.append(hinge_by_hand(lines, x_, 0.15))
        label = torch.tensor([y])
        clean = float(F.cross_entropy(model(x[None]).detach().double(), label))
        attacked = float(F.cross_entropy(model(x_[None]).detach().double(), label))
        total += (0.5 * (clean + attacked) if method.at else clean) + 0.7 * terms[-1]
    assert max(terms) > 4 and len({round(t, 3) for t in terms}) > 5  # violated rows take part
    found = method.loss(model, here, adv)
    assert float(found.value.detach()) == pytest.approx(total / len(here.x), rel=1e-4)
    assert method.radius(0.999) == pytest.approx(0.1024)


def test_two_hidden_layers_tell_the_lines_apart():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    here = batch()
    options = {"alpha": 0.15, "at": here.x * 0.9}
    linear = envelope_loss(model, here.x, here.y, 0.1, **options)
    interval = envelope_loss(model, here.x, here.y, 0.1, method="ibp-linear", **options)
    assert bool((linear < interval + 1e-5).all()) and bool((linear < interval - 1e-4).any())


def test_rows_out_of_reach_leave_finite_losses_and_gradients():
    """A violated row that nothing in the box mends, one of zeros, and satisfied ones that nothing breaks."""
    rows = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [1e-8, 0.0], [0.0, 0.0], [1.0, 1.0]]], requires_grad=True)
    margins = torch.tensor([[-3.0, -1.0, -1.0, 2.0, 0.05]], requires_grad=True)
    distances = fr.ops.polyhedral_distance(rows, margins, -0.5, 0.5, math.inf, signed=True)
    assert distances[0, :3].eq(-math.inf).all() and distances[0, 3] == math.inf
    value = envelope_hinge(distances, margins, rows, 0.5, math.inf, count=5)
    # rows 0 and 1, 2: capped at 10 alpha; row 3: none; row 4 is 0.025 away
    assert value.item() == pytest.approx(3 * 11 + 0.95)
    value.sum().backward()
    assert rows.grad.isfinite().all() and margins.grad.isfinite().all()
    assert margins.grad[0, 4].item() == pytest.approx(-1.0)
    close = torch.tensor([[-0.3]], requires_grad=True)  # violated, in reach of twice the free distance
    row = torch.tensor([[[0.5, 0.01]]])
    distance = fr.ops.polyhedral_distance(row, close, -0.5, 0.5, math.inf, signed=True)
    assert distance == -math.inf
    term = envelope_hinge(distance, close, row, 0.5, math.inf)
    assert term.item() == pytest.approx(1 + 2 * 0.3 / 0.51 / 0.5)
    term.sum().backward()
    assert close.grad.item() == pytest.approx(-2 / 0.51 / 0.5)


BOTH_NORMS = [
    (name, norm) for name in ("kw", "ibp", "crown-ibp", "l-per", "i-per+at", "mtl-ibp") for norm in ("Linf", "L2")
]


@pytest.mark.parametrize(("name", "norm"), [*BOTH_NORMS, ("sabr", "Linf")])
def test_gradients_against_differences(name, norm):
    """Of the whole loss, along a random direction of all parameters, in float64."""
    model, here = network(dtype=torch.float64), batch(6, torch.float64, epoch=20, epochs=100)
    method = METHODS[name](0.05, norm=norm)
    adv = method.perturb(model, here)
    value = method.loss(model, here, adv).value
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters)
    generator = torch.Generator().manual_seed(7)
    ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, way in zip(parameters, ways, strict=True):
                p.add_(sign * 1e-6 * way)
            ends.append(float(method.loss(model, here, adv).value))
            for p, way in zip(parameters, ways, strict=True):
                p.sub_(sign * 1e-6 * way)
    slope = sum(float((g * way).sum()) for g, way in zip(grads, ways, strict=True))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_small_regions_and_both_tasks_line_by_line():
    model, here = network(), batch(epoch=60, epochs=100)
    sabr, both = METHODS["sabr"](0.1, share=0.3), METHODS["mtl-ibp"](0.1, share=0.3, l1=0.01)
    adv = sabr.perturb(model, here)
    assert float((adv - here.x).abs().max()) <= 0.07 + 1e-6
    worst = [
        cross_entropy_by_hand(margins_by_hand(model, x, y, 0.03, "ibp")[0])
        for x, y in zip(adv, here.y.tolist(), strict=True)
    ]
    assert float(sabr.loss(model, here, adv).value.detach()) == pytest.approx(sum(worst) / len(worst), rel=2e-5)
    adv = both.perturb(model, here)
    total = 0.01 * sum(float(p.detach().double().abs().sum()) for p in (model[0].weight, model[2].weight))
    for x, x_, y in zip(here.x, adv, here.y.tolist(), strict=True):
        attacked = float(F.cross_entropy(model(x_[None]).detach().double(), torch.tensor([y])))
        total += (0.7 * attacked + 0.3 * cross_entropy_by_hand(margins_by_hand(model, x, y, 0.1, "ibp")[0])) / len(
            here.x
        )
    assert float(both.loss(model, here, adv).value.detach()) == pytest.approx(total, rel=2e-5)


def test_a_subsample_is_bounded_and_the_whole_batch_attacked(monkeypatch):
    model, here = network(), batch(12, epoch=90, epochs=100)
    seen = []
    true = certified.envelope_loss
    monkeypatch.setattr(
        certified, "envelope_loss", lambda m, x, *a, **k: seen.append((x, k["at"])) or true(m, x, *a, **k)
    )
    method = METHODS["l-per+at"](subsample=5)
    adv = method.perturb(model, here)
    assert bool((adv != here.x).flatten(1).any(1).all())
    chosen = set()
    for _ in range(30):
        method.loss(model, here, adv)
        x, at = seen[-1]
        assert len(x) == 5
        for row, point in zip(x, at, strict=True):
            (index,) = (here.x == row).all(1).nonzero()[0].tolist()
            assert torch.equal(adv[index], point)
            chosen.add(index)
    assert chosen == set(range(12))


def test_batch_norm_takes_the_clean_statistics_once():
    """Bounds see the batch norms as the clean pass did, and the running statistics move by one clean batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INPUTS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, CLASSES)).train()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1.5)
        model[1].bias.uniform_(-0.5, 0.5)
    here = batch(16, epoch=60, epochs=100)
    hidden = model[0](here.x)
    mean, var = hidden.mean(0), hidden.var(0, unbiased=False)
    factor = model[1].weight / (var + model[1].eps).sqrt()
    folded = nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    with torch.no_grad():
        folded[0].weight.copy_(factor[:, None] * model[0].weight)
        folded[0].bias.copy_(factor * (model[0].bias - mean) + model[1].bias)
        folded[2].weight.copy_(model[3].weight)
        folded[2].bias.copy_(model[3].bias)
    for name in ("kw", "ibp", "i-per", "l-per+at", "sabr", "mtl-ibp"):
        method = METHODS[name](0.02)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        torch.manual_seed(1)
        adv = method.perturb(model, here)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        found = method.loss(model, here, adv)
        expected = method.loss(folded, here, adv).value
        assert float(found.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        assert all(m.training for m in model.modules()) and isinstance(model[1].weight, nn.Parameter)
        torch.testing.assert_close(model[1].running_mean, 0.9 * before["1.running_mean"] + 0.1 * mean)
        assert int(model[1].num_batches_tracked) == int(before["1.num_batches_tracked"]) + 1
        found.value.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_interval_initialisation_keeps_the_width():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    x = torch.rand(4, 3, 8, 8)
    grown = compute_bounds(model, x, 0.01, method="ibp")
    certified.ibp_init(model)
    found = compute_bounds(model, x, 0.01, method="ibp")
    ratio = float((found.upper - found.lower).mean()) / 0.02
    assert 0.5 < ratio < 4 and not 0.5 < float((grown.upper - grown.lower).mean()) / 0.02 < 4
    assert bool((model[-1].bias == 0).all())


# name, options, the bounds that certify at eps 0.1, what they must certify
LEARNERS = (
    ("kw", {}, "fast-lin", 0.70),
    ("ibp", {}, "ibp", 0.40),
    ("crown-ibp", {}, "crown-ibp", 0.55),
    ("l-per", {"eps": 0.0064, "beta": 0.3}, "fast-lin", 0.60),
    ("l-per+at", {"eps": 0.0064, "beta": 0.3}, "fast-lin", 0.60),
    ("i-per+at", {"eps": 0.0064, "beta": 0.3, "subsample": 16}, "ibp-linear", 0.57),
    ("sabr", {"share": 0.7}, "ibp", 0.40),
    ("mtl-ibp", {}, "ibp", 0.40),
)


def trained(method, epochs=10):
    digits = data.load("digits", "train")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(digits.images, digits.labels), 64, shuffle=True, generator=torch.Generator()
    )
    history = train(model, loader, method, epochs=epochs, optimizer=torch.optim.Adam(model.parameters(), 3e-3))
    return model, history


def proven(model, bounds):
    """Share of the test digits that is certified."""
    held = data.load("digits", "test")
    options = {"clip": (0, 1), "method": bounds, "labels": held.labels, "sides": "lower"}
    return float((compute_bounds(model, held.images, 0.1, **options).lower.amin(1) > 0).double().mean())


@pytest.fixture(scope="module")
def plain():
    return trained(Method())[0]


@pytest.mark.parametrize(("name", "options", "bounds", "least"), LEARNERS, ids=[row[0] for row in LEARNERS])
def test_certified_accuracy_rises_on_the_digits(name, options, bounds, least, plain):
    model, history = trained(METHODS[name](**{"eps": 0.1, **options}))
    after = proven(model, bounds)
    assert history[-1]["accuracy"] > 0.8
    assert after > least and after > proven(plain, bounds) + 0.1


def test_bad_settings():
    for settings, text in (
        ({"eps": -1.0}, "eps: got -1.0"), ({"ramp": (0.5, 0.2)}, "ramp: got"), ({"subsample": 0}, "subsample: got 0"),
        ({"kappa": (2.0, 0.0)}, "kappa: got"), ({"bounds": "no"}, "method: got 'no'"),
        ({"fusion": True, "bounds": "ibp"}, "fusion: got True"), ({"start": 2.0}, "start: got"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            certified.WorstCase(**settings)
    for settings in ({"alpha": 0.0}, {"growth": 0.0}, {"every": 2.0}, {"count": 0}):
        with pytest.raises(ValueError, match="got"):
            certified.PER(**settings)
    with pytest.raises(ValueError, match="norm: got 2"):
        certified.SABR(norm=2)
    with pytest.raises(ValueError, match="share: got 0"):
        certified.SABR(share=0)
    with pytest.raises(ValueError, match="share: got 3"):
        certified.MTLIBP(share=3)
    with pytest.raises(ValueError, match="alpha: got 0"):
        envelope_loss(network(), batch().x, batch().y, 0.1, alpha=0)
