"""alpha-crown: the search for slopes against linear programs, differences, sampling and CROWN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.bounds import SlopeSearch, compute_bounds, slope_search
from fastrobust.bounds.auto_lirpa import BoundedModule, BoundedTensor, PerturbationLpNorm


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.third, self.last = nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        return self.last((self.third(self.second(h).relu()) + h).relu().flatten(1))


def dense(activation) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(128, 12), activation(), nn.Linear(12, 10), activation(), nn.Linear(10, 4)
    )


NETWORKS = {
    "relu": lambda: dense(nn.ReLU),
    "leaky": lambda: dense(nn.LeakyReLU),
    "tanh": lambda: dense(nn.Tanh),
    "sigmoid": lambda: dense(nn.Sigmoid),
    "gelu": lambda: dense(nn.GELU),
    "softplus": lambda: dense(nn.Softplus),
    "hardtanh": lambda: dense(nn.Hardtanh),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 4),
    ),
    "pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 8), nn.ReLU(), nn.Linear(8, 4)
    ),
    "residual": Residual,
}


def network(name, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2 if p.dim() > 1 else 1)
    return model.to(dtype).eval()


def images(count=3, dtype=torch.float32):
    return torch.rand(count, 2, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


LABELS = torch.tensor([0, 1, 3])
SETS = (
    (math.inf, 0.03, None),
    (math.inf, 0.05, (0.0, 1.0)),
    (2.0, 0.3, (0.0, 1.0)),
    (1.0, 1.0, None),
    (3.0, 0.2, None),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.thorough) if n in ("gelu", "softplus", "sigmoid") else n for n in NETWORKS],
)
@pytest.mark.parametrize(("norm", "eps", "clip"), SETS)
def test_sound_and_nowhere_looser_than_crown(name, norm, eps, clip):
    model, x = network(name), images()
    options = {"norm": norm, "clip": clip, "labels": LABELS}
    with torch.no_grad():
        plain = compute_bounds(model, x, eps, method="crown", **options)
        # CROWN's hidden intervals: what the rows gain by themselves
        own = compute_bounds(
            model, x, eps, method="alpha-crown", slopes=SlopeSearch(hidden=0, iterations=10), **options
        )
        best = compute_bounds(model, x, eps, method="alpha-crown", slopes=SlopeSearch(iterations=8), **options)
    for found in (own, best):
        assert bool((found.lower >= plain.lower - 1e-6).all()) and bool((found.upper <= plain.upper + 1e-6).all())
    assert bool((own.lower >= plain.lower).all()) and bool((own.upper <= plain.upper).all())
    assert float((plain.upper - plain.lower).mean() - (best.upper - best.lower).mean()) > 0
    for trial in range(20):
        at = fr.ops.random_start(x, eps, norm, clip, seed=trial) if norm != 3 else x + eps * _in_ball(x, trial)
        with torch.no_grad():
            z = model(at)
        margins = torch.stack([z[i, y] - z[i][torch.arange(4) != y] for i, y in enumerate(LABELS.tolist())])
        assert bool((margins >= best.lower - 1e-4).all()) and bool((margins <= best.upper + 1e-4).all())


def _in_ball(x, seed):
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).flatten(1)
    return (way / way.norm(3, 1, keepdim=True)).view(x.shape)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("norm", "clip"), ((math.inf, None), (2.0, None), (2.0, (0.0, 1.0)), (1.0, (0.0, 1.0))))
def test_the_gradient_by_a_pass_forward(name, norm, clip, monkeypatch):
    """In float64 against differences of the bounds themselves, along a random direction of all slopes, from random
    slopes."""
    model, x = network(name, 3, torch.float64), images(dtype=torch.float64)
    seen = []

    def search(problem, options, begin):
        generator = torch.Generator().manual_seed(5)
        moves = {}
        for i, s in problem.slopes.items():
            if s.sides:
                random = torch.rand(s.at.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
                s.at.copy_(torch.where(s.free, random, s.at))
                moves[i] = torch.randn(s.at.shape, generator=generator, dtype=torch.float64) * s.free
        lines = {i: s.lines() for i, s in problem.slopes.items()}
        _, kept, walk = problem.bound(lines)
        point = slope_search._lowest(kept[0][0], problem.region)
        values = slope_search._followed(problem, point, lines, walk.seen)
        slope = 0.0
        for i, way in moves.items():
            s = problem.slopes[i]
            g = s.gradient(walk.seen[i], values[problem.graph.nodes[i].inputs[0]])
            slope = slope + (g * way).flatten(2).sum((0, 2))
        ends = []
        for sign in (1, -1):
            moved = {
                i: s.lines(s.at + sign * 1e-6 * moves[i]) if s.sides else s.lines() for i, s in problem.slopes.items()
            }
            ends.append(problem.bound(moved)[0])
        seen.append((slope, (ends[0] - ends[1]) / 2e-6))
        return begin, {i: s.best for i, s in problem.slopes.items() if s.sides}

    monkeypatch.setattr(slope_search, "_search", search)
    with torch.no_grad():
        compute_bounds(model, x, 0.3, norm=norm, clip=clip, method="alpha-crown", labels=LABELS, sides="lower")
    assert len(seen) >= 2  # of hidden neurons too
    for slope, difference in seen:
        assert bool(((slope - difference).abs() <= 1e-4 * difference.abs().max()).double().mean() > 0.97)  # kinks
    assert float(seen[-1][1].abs().max()) > 1e-4


def test_one_hidden_layer_reaches_the_linear_program():
    """The best slopes solve the dual of the triangle relaxation (Salman et al. 2019)."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double().eval()
    x, y, eps = torch.rand(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0]), 0.4
    with torch.no_grad():
        options = {"labels": y, "sides": "lower"}
        plain = compute_bounds(model, x, eps, method="crown", **options).lower
        found = compute_bounds(
            model, x, eps, method="alpha-crown", slopes=SlopeSearch(400, lr=0.2, decay=0.985), **options
        ).lower
    w, b = model[0].weight.detach(), model[0].bias.detach()
    v, c = model[2].weight.detach(), model[2].bias.detach()
    gains = []
    for i in range(4):
        l, u = w @ x[i] + b - w.abs().sum(1) * eps, w @ x[i] + b + w.abs().sum(1) * eps
        for k, j in enumerate(j for j in range(3) if j != y[i]):
            # variables: the input and the hidden values; triangle around every unstable neuron
            rows, limits, equal, values, box = [], [], [], [], [(float(t) - eps, float(t) + eps) for t in x[i]]
            for n in range(12):
                unit = torch.zeros(12, dtype=torch.float64)
                unit[n] = 1
                if l[n] >= 0:
                    equal.append([*(-w[n]).tolist(), *unit.tolist()])
                    values.append(float(b[n]))
                    box.append((None, None))
                elif u[n] <= 0:
                    box.append((0, 0))
                else:
                    slope = u[n] / (u[n] - l[n])
                    rows += [[*w[n].tolist(), *(-unit).tolist()], [*(-slope * w[n]).tolist(), *unit.tolist()]]
                    limits += [float(-b[n]), float(slope * (b[n] - l[n]))]
                    box.append((0, None))
            cost = [0.0] * 5 + (v[y[i]] - v[j]).tolist()
            solved = linprog(cost, rows or None, limits or None, equal or None, values or None, box)
            best = solved.fun + float(c[y[i]] - c[j])
            assert float(found[i, k]) <= best + 1e-7
            assert best - float(found[i, k]) <= 2e-3 * max(best - float(plain[i, k]), 0.05)
            gains.append(best - float(plain[i, k]))
    assert max(gains) > 0.01


def test_twenty_steps_are_nearly_enough():
    """Of what 600 careful steps gain on CROWN, the 20 of the default miss little, in each margin (the bound is concave
    in the slopes of one layer)."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10)).eval().requires_grad_(False)
    x = torch.rand(8, 64)
    y = model(x).argmax(1)
    for eps in (0.1, 0.2):
        plain, best, found = (
            compute_bounds(model, x, eps, method=method, labels=y, sides="lower", slopes=search).lower
            for method, search in (
                ("crown", None), ("alpha-crown", SlopeSearch(600, lr=0.3)), ("alpha-crown", SlopeSearch()),
            )
        )  # fmt: skip
        assert float((best - found).sum()) < 0.01 * float((best - plain).sum())
        assert float(((best - found) / (best - plain)).max()) < 0.06


def test_windows_and_whole_images_agree(monkeypatch):
    model, x = network("convolutions"), images()
    options = {"method": "alpha-crown", "labels": LABELS, "clip": (0, 1), "return_intermediate": True}
    for norm, eps in ((math.inf, 0.04), (2, 0.4), (1, 1.5)):
        taken = []
        true = slope_search._cone
        monkeypatch.setattr(slope_search, "_cone", lambda *a: taken.append(true(*a)) or taken[-1])  # noqa: B023
        with torch.no_grad():
            ours = compute_bounds(model, x, eps, norm=norm, **options)
        assert any(c is not None for c in taken)
        monkeypatch.setattr(slope_search, "_cone", lambda *a: None)
        with torch.no_grad():
            dense_rows = compute_bounds(model, x, eps, norm=norm, **options)
        monkeypatch.setattr(slope_search, "_cone", true)
        torch.testing.assert_close(ours.lower, dense_rows.lower, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.upper, dense_rows.upper, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sides", ("both", "lower", "upper"))
@pytest.mark.parametrize("rows", ("labels", "spec", "outputs"))
def test_sides_rows_and_the_linear_map(sides, rows):
    model, x = network("residual"), images()
    spec = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    asked = {"labels": {"labels": LABELS}, "spec": {"spec": spec}, "outputs": {}}[rows]
    with torch.no_grad():
        options = {"method": "alpha-crown", "slopes": SlopeSearch(iterations=6), **asked}
        whole = compute_bounds(model, x, 0.05, **options)
        found = compute_bounds(model, x, 0.05, sides=sides, return_linear=True, **options)
        for trial in range(5):
            at = fr.ops.random_start(x, 0.05, math.inf, None, seed=trial)
            z = model(at)
            if rows == "labels":
                z = torch.stack([z[i, y] - z[i][torch.arange(4) != y] for i, y in enumerate(LABELS.tolist())])
            elif rows == "spec":
                z = torch.einsum("bsk,bk->bs", spec, z)
            if sides != "upper":
                assert bool((found.linear.lower_at(at) <= z + 1e-4).all())
            if sides != "lower":
                assert bool((found.linear.upper_at(at) >= z - 1e-4).all())
        center, reach = x.flatten(1), 0.05
        for name, sign in (("lower", -1), ("upper", 1)):
            value = getattr(found, name)
            if sides in ("both", name):
                torch.testing.assert_close(value, getattr(whole, name), rtol=1e-5, atol=1e-5)
                A, b = getattr(found.linear, f"{name}_A").flatten(2), getattr(found.linear, f"{name}_b")
                extreme = torch.einsum("bsn,bn->bs", A, center) + b + sign * reach * A.abs().sum(2)
                torch.testing.assert_close(extreme, value, rtol=1e-4, atol=1e-5)
            else:
                assert value is None


def test_proven_rows_leave_the_search():
    """With ``stop`` signs stay, rows that are not proven get the same bounds, and fewer rows are walked."""
    model, x = network("relu"), images()
    walked = []
    true = slope_search._Problem.bound
    options = {"labels": model(x).argmax(1), "sides": "lower", "method": "alpha-crown"}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            slope_search._Problem, "bound", lambda self, *a, **k: walked.append(self.count) or true(self, *a, **k)
        )
        for eps in (0.004, 0.008):
            counts, found = [], []
            for stop in (None, 0.0):
                walked.clear()
                search = SlopeSearch(hidden=0, stop=stop)
                found.append(compute_bounds(model, x, eps, slopes=search, **options).lower)
                counts.append(sum(walked))
            assert torch.equal(found[0] > 0, found[1] > 0) and counts[1] < counts[0]
            open_rows = found[1] <= 0
            assert torch.allclose(found[0][open_rows], found[1][open_rows], atol=1e-5)


@pytest.mark.parametrize("name", ("relu", "tanh", "residual"))
def test_outward_rounding(name):
    model, x = network(name), images()
    options = {"labels": LABELS, "slopes": SlopeSearch(iterations=6)}
    with torch.no_grad():
        near = compute_bounds(model, x, 0.05, method="alpha-crown", **options)
        far = compute_bounds(model, x, 0.05, method="alpha-crown", rounding="outward", **options)
        plain = compute_bounds(model, x, 0.05, method="crown", rounding="outward", labels=LABELS)
    assert bool((far.lower >= plain.lower).all()) and bool((far.upper <= plain.upper).all())
    # the two searches round differently, and steps of six iterations carry that on
    torch.testing.assert_close(far.lower, near.lower, rtol=5e-3, atol=5e-3)
    exact = network(name, dtype=torch.float64)
    with torch.no_grad():
        for trial in range(10):
            z = exact(fr.ops.random_start(x, 0.05, math.inf, None, seed=trial).double())
            margins = torch.stack([z[i, y] - z[i][torch.arange(4) != y] for i, y in enumerate(LABELS.tolist())])
            assert bool((margins >= far.lower.double()).all()) and bool((margins <= far.upper.double()).all())


def test_gradients_at_the_best_slopes():
    """The slopes are constants of the gradient: that of the best bounds, since they are stationary there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 4)).double().eval()
    x, eps = images(dtype=torch.float64).requires_grad_(), torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    search = SlopeSearch(300, lr=0.2, decay=0.97)

    def total():
        found = compute_bounds(model, x, eps, method="alpha-crown", labels=LABELS, slopes=search, sides="lower")
        return found.lower.sum()

    inputs = (x, eps, model[1].weight)
    grads = torch.autograd.grad(total(), inputs)
    for t, g in zip(inputs, grads, strict=True):
        way = torch.randn(t.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                t.add_(sign * 1e-4 * way)
                ends.append(float(total()))
                t.sub_(sign * 1e-4 * way)
        expected = (ends[0] - ends[1]) / 2e-4
        assert float((g * way).sum()) == pytest.approx(expected, rel=0.02, abs=0.02)


def test_inference_mode_states_and_certificates():
    model, x = network("relu"), images()
    before = [p.clone() for p in model.parameters()]
    with torch.inference_mode():
        inside = compute_bounds(model, x, 0.03, method="alpha-crown", labels=LABELS)
    outside = compute_bounds(model, x, 0.03, method="alpha-crown", labels=LABELS)
    torch.testing.assert_close(inside.lower, outside.lower.detach(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before, strict=True))
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)
    ).eval()
    y = model(x).argmax(1)
    options = {"clip": (0, 1), "high": 0.3, "tol": 1e-5}
    with torch.no_grad():
        best = fr.certify.search_radius(model, x, y, method="alpha-crown", **options).radius
        crown = fr.certify.search_radius(model, x, y, method="crown", **options).radius
        found = fr.certify.polyhedral_envelope(model, x, y, 0.05, method="alpha-crown", slopes=SlopeSearch(5))
        hit = fr.attacks.pgd(model, x, y, eps=best, restarts=2, check=False)
        assert torch.equal(model(hit).argmax(1), y)
    assert bool((best >= crown - 1e-5).all()) and bool((best > crown + 2e-5).any())
    assert bool((found.distance >= fr.certify.polyhedral_envelope(model, x, y, 0.05).distance - 0.05).all())


def test_auto_lirpa_names():
    model, x = network("relu"), images()
    bounded = BoundedModule(model, x, {"optimize_bound_args": {"iteration": 7, "lr_alpha": 0.3, "lr_decay": 0.95}})
    given = BoundedTensor(x, PerturbationLpNorm(eps=0.03))
    with torch.no_grad():
        low, up = bounded.compute_bounds(x=(given,), method="CROWN-Optimized")
        same = compute_bounds(model, x, 0.03, method="alpha-crown", slopes=SlopeSearch(7, 0.3, 0.95))
    assert torch.equal(low, same.lower) and torch.equal(up, same.upper)


@pytest.mark.parametrize("name", ("relu", "convolutions", "residual"))
def test_as_tight_as_auto_lirpa(name):
    """At equal iterations; its slopes of hidden neurons serve the outputs, ours the neurons themselves."""
    peer = pytest.importorskip("auto_LiRPA")
    model, x = network(name), images()
    eye = torch.eye(4)
    C = (eye[LABELS][:, None] - eye[None])[~eye[LABELS].bool()].view(3, 3, 4)
    module = peer.BoundedModule(model, x, device="cpu", bound_opts={"optimize_bound_args": {"iteration": 20}})
    given = peer.BoundedTensor(x, peer.PerturbationLpNorm(norm=math.inf, eps=0.03))
    theirs, _ = module.compute_bounds(x=(given,), C=C, method="CROWN-Optimized", bound_upper=False)
    with torch.no_grad():
        plain = compute_bounds(model, x, 0.03, method="crown", labels=LABELS, sides="lower").lower
        ours = compute_bounds(
            model, x, 0.03, method="alpha-crown", labels=LABELS, sides="lower", slopes=SlopeSearch(20, hidden=20)
        ).lower
    gain = (theirs - plain).mean()
    assert float((ours - plain).mean()) > 0.97 * float(gain)


def test_bad_searches():
    model, x = network("relu"), images()
    with pytest.raises(ValueError, match="slopes: got"):
        compute_bounds(model, x, 0.1, method="crown", slopes=SlopeSearch())
    for settings, text in (
        ({"iterations": 0}, "iterations: got 0"), ({"lr": 0.0}, "lr: got 0.0"), ({"decay": 2.0}, "decay: got 2.0"),
        ({"hidden": -1}, "hidden: got -1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            SlopeSearch(**settings)


def test_nothing_to_choose():
    """No examples, and networks without an activation."""
    options = {"method": "alpha-crown", "return_linear": True}
    model = network("relu")
    with torch.no_grad():
        none = compute_bounds(model, images()[:0], 0.1, labels=LABELS[:0], **options)
        assert none.lower.shape == (0, 3) and none.linear.lower_A.shape == (0, 3, 2, 8, 8)
        linear = nn.Sequential(nn.Flatten(), nn.Linear(128, 4)).eval()
        ours = compute_bounds(linear, images(), 0.1, labels=LABELS, **options)
        plain = compute_bounds(linear, images(), 0.1, labels=LABELS, method="crown", return_linear=True)
    assert torch.equal(ours.lower, plain.lower) and torch.equal(ours.linear.lower_A, plain.linear.lower_A)
