"""What fr.certify.verify calls verified, attacked: by the benchmark's own points, on networks trained for it; and models
and radii at its edges."""

import math

import pytest
import torch
from benchmarks.attacked_verdicts import attacked
from torch import Tensor, nn

import fastrobust as fr


def trained(network: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Three classes of blurred patterns, learnt with noise: margins of all sizes."""
    torch.manual_seed(1)
    centers = torch.rand(3, 1, 6, 6)
    y = torch.arange(300) % 3
    x = (centers[y] + 0.35 * torch.randn(300, 1, 6, 6)).clamp(0, 1)
    if network == "dense":
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 3))
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3)
        )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False), x[:60], y[:60]


@pytest.mark.parametrize("points", [3000, pytest.param(100_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("network, norm, eps", [("dense", "Linf", 0.2), ("dense", "L2", 0.6), ("conv", "Linf", 0.2)])
def test_no_point_of_a_verified_set_is_predicted_otherwise(network: str, norm: str, eps: float, points: int) -> None:
    model, x, y = trained(network)
    found = fr.certify.verify(model, x, y, eps, norm=norm, timeout=20)
    proven = torch.tensor([s == "verified" for s in found.status])
    assert 10 <= int(proven.sum()) < len(x)
    assert ("branch", "verified") in set(zip(found.stage, found.status, strict=True))
    counts = attacked(model, x[proven], y[proven], found.lower[proven], eps, norm, points)
    assert counts.attacked >= points
    assert counts.fooled == 0
    assert counts.least > -1e-5


def test_the_points_find_what_is_not_robust() -> None:
    """The same points fool what is falsified, so that none above means something."""
    model, x, y = trained("dense")
    found = fr.certify.verify(model, x, y, 0.2, timeout=20)
    weak = torch.tensor([s == "falsified" for s in found.status])
    counts = attacked(model, x[weak], y[weak], found.lower[weak], 0.2, "Linf", 500)
    assert counts.fooled > 100


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_radii_of_examples_as_one_by_one(norm: str) -> None:
    model, x, y = trained("dense")
    x, y, eps = x[:12], y[:12], torch.linspace(0.01, 0.2, 12) * (1 if norm == "Linf" else 4.5)
    together = fr.certify.verify(model, x, y, eps, norm=norm, timeout=20)
    alone = [
        fr.certify.verify(model, x[i : i + 1], y[i : i + 1], float(eps[i]), norm=norm, timeout=20) for i in range(12)
    ]
    assert together.status == [v.status[0] for v in alone]
    assert len(set(together.status)) == 2
    for i, v in enumerate(alone):
        if v.stage[0] == "bounds":
            assert math.isclose(float(together.lower[i]), float(v.lower[0]), rel_tol=1e-4, abs_tol=1e-5)


def test_log_softmax_at_the_end_changes_no_verdict() -> None:
    model, x, y = trained("dense")
    ended = nn.Sequential(model, nn.LogSoftmax(1)).eval()
    plain, found = (fr.certify.verify(m, x, y, 0.2, timeout=20) for m in (model, ended))
    assert found.status == plain.status
    assert found.stage.count("branch") >= 1
    outward = fr.certify.verify(ended, x, y, 0.06, rounding="outward", timeout=20)
    assert "verified" in outward.status
    assert outward.status == fr.certify.verify(model, x, y, 0.06, rounding="outward", timeout=20).status


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.LayerNorm([4, 4, 4]), nn.Mish(), nn.Softmax(1)])
def test_layers_that_are_bounded_and_not_split_are_told(layer: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.rand(8, 1, 6, 6)
    y = model(x).argmax(1)
    tiny = fr.certify.verify(model, x, y, 1e-4)
    assert tiny.stage == ["bounds"] * 8 and tiny.note == ""
    found = fr.certify.verify(model, x, y, 0.2, restarts=1, steps=2)
    assert "branch" not in found.stage
    assert "unknown" not in found.status or found.note.startswith("branch and bound: left out, because ")


def test_layers_without_bounds_are_refused_by_name() -> None:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    model = nn.Sequential(nn.Conv2d(1, 4, 3), Sine(), nn.Flatten(), nn.Linear(64, 3)).eval()
    with pytest.raises(fr.bounds.UnsupportedLayerError, match="sin"):
        fr.certify.verify(model, torch.rand(2, 1, 6, 6), torch.tensor([0, 1]), 0.05)
