"""fr.certify.verify against HiGHS's MILP of the same network, written here."""

import math

import pytest
import torch
from torch import nn

import fastrobust as fr


def milp_minimum(model: nn.Sequential, x: torch.Tensor, y: int, t: int, eps: float) -> float:
    """min z_y - z_t over the ball cut by [0, 1], big-M encoding with interval bounds, in float64."""
    highspy = pytest.importorskip("highspy")
    h = highspy.Highs()
    h.setOptionValue("output_flag", False)
    h.setOptionValue("mip_rel_gap", 0.0)
    h.setOptionValue("mip_abs_gap", 1e-9)
    lo, hi = (x.double() - eps).clamp(min=0).tolist(), (x.double() + eps).clamp(max=1).tolist()
    z = [h.addVariable(lb=a, ub=b) for a, b in zip(lo, hi, strict=False)]
    for layer in model:
        if isinstance(layer, nn.Linear):
            w, b = layer.weight.double().tolist(), layer.bias.double().tolist()
            new, low, up = [], [], []
            for row, c in zip(w, b, strict=False):
                low.append(c + sum(min(v * p, v * q) for v, p, q in zip(row, lo, hi, strict=False)))
                up.append(c + sum(max(v * p, v * q) for v, p, q in zip(row, lo, hi, strict=False)))
                out = h.addVariable(lb=-math.inf, ub=math.inf)
                h.addConstr(sum(v * q for v, q in zip(row, z, strict=False)) - out == -c)
                new.append(out)
            z, lo, hi = new, low, up
        else:
            new = []
            for v, p, q in zip(z, lo, hi, strict=False):
                r, on = h.addVariable(lb=0, ub=max(q, 0)), h.addBinary()
                h.addConstr(r - v >= 0)
                h.addConstr(r - v - min(p, 0) * on <= -min(p, 0))
                h.addConstr(r - max(q, 0) * on <= 0)
                new.append(r)
            z, lo, hi = new, [max(p, 0) for p in lo], [max(q, 0) for q in hi]
    h.minimize(z[y] - z[t])
    assert h.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return h.getInfo().objective_function_value


@pytest.mark.parametrize(
    "seeds", [range(20), *(pytest.param(range(k, k + 20), marks=pytest.mark.thorough) for k in range(20, 200, 20))]
)
def test_verdicts_are_those_of_milp(seeds: range) -> None:
    """Networks of two and three layers; bounds by intervals on every other one leave most to branch and bound."""
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        hidden = [nn.Linear(8, 8), nn.ReLU()] if seed % 2 else []
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), *hidden, nn.Linear(8, 3)).eval().requires_grad_(False)
        x = torch.rand(3, 4, generator=g)
        y = model(x).argmax(1)
        eps, method = (0.1, 0.25, 0.4)[seed % 3], ("crown", "ibp")[seed // 2 % 2]
        v = fr.certify.verify(model, x, y, eps, timeout=100, max_subproblems=1000, steps=2, method=method)
        for i in range(3):
            exact = min(milp_minimum(model, x[i], int(y[i]), t, eps) for t in range(3) if t != int(y[i]))
            if abs(exact) < 1e-5:  # within HiGHS's tolerances
                continue
            assert v.status[i] == ("verified" if exact > 0 else "falsified"), (seed, i, exact)
            if v.status[i] == "verified":
                assert float(v.lower[i]) <= exact + 1e-5
            else:
                p = v.counterexamples[i]
                assert model(p[None]).argmax() != y[i]
                assert p.min() >= 0 and p.max() <= 1 and (p.double() - x[i].double()).abs().max() <= eps


def test_convolutions_and_branching() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    model.eval()
    x = torch.rand(6, 1, 4, 4)
    y = model(x).argmax(1)
    v = fr.certify.verify(model, x, y, 0.2, timeout=5)
    near = (x[:, None] + 0.2 * (2 * torch.rand(6, 4000, 1, 4, 4) - 1)).clamp(0, 1)
    for i, status in enumerate(v.status):
        if status == "verified":
            assert bool((model(near[i]).argmax(1) == y[i]).all())
        elif status == "falsified":
            assert model(v.counterexamples[i : i + 1]).argmax() != y[i]


def test_branches_are_right_on_a_grid() -> None:
    """Two inputs, so that a grid sees every piece; bounds by intervals, so that branching decides."""
    grid = torch.cartesian_prod(torch.linspace(-1, 1, 161), torch.linspace(-1, 1, 161))
    stages = []
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
        x = torch.rand(3, 2)
        y = model(x).argmax(1)
        v = fr.certify.verify(model, x, y, 0.3, clip=None, timeout=10, method="ibp", restarts=1, steps=1)
        for i, status in enumerate(v.status):
            with torch.no_grad():
                right = bool((model(x[i] + 0.3 * grid).argmax(1) == y[i]).all())
            assert right or status != "verified", (seed, i)
            if status == "falsified":
                point = v.counterexamples[i : i + 1]
                assert model(point).argmax() != y[i] and (point.double() - x[i].double()).abs().max() <= 0.3
        stages += [(s, t) for s, t in zip(v.stage, v.status, strict=True)]
    assert stages.count(("branch", "verified")) >= 5 and [t for _, t in stages].count("unknown") <= 2
