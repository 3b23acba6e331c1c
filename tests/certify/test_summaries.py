"""Curves and averages by hand, and pictures that can be drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.certify import average_certified_bound, certified_curve, certified_robust_error, plots


def test_errors_and_averages():
    radius = torch.tensor([0.0, 0.05, 0.1, 0.1, math.nan])
    assert certified_robust_error(radius, 0.1) == pytest.approx(60.0)  # float32(0.1) counts as 0.1
    assert certified_robust_error(radius, 0.05) == pytest.approx(40.0)
    assert average_certified_bound(radius) == pytest.approx(0.05)
    curve = certified_curve(radius, torch.tensor([0.0, 0.05, 0.06, 0.2]))
    assert curve.share.tolist() == pytest.approx([1.0, 0.6, 0.4, 0.0])
    steps = certified_curve(radius)
    assert (steps.share.diff() <= 0).all()
    with pytest.raises(ValueError, match="radius"):
        average_certified_bound(torch.empty(0))


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 3)).eval()
    points = torch.rand(4, 2) * 2 - 1
    y = model(points).argmax(1)
    found = fr.certify.nonuniform_radius(model, points, y, iterations=10)
    pictures = {
        "regions": plots.regions(model, points, found.uniform, found.eps, resolution=40),
        "map": plots.bounding_map(torch.rand(1, 7, 7)),
        "flat_map": plots.bounding_map(torch.rand(49)),
        "histogram": plots.radius_histogram({"a": torch.rand(30), "b": torch.rand(30)}, target=0.3),
        "curve": plots.bound_curve(model, points[:1], y[:1], torch.linspace(0.01, 1, 30)),
    }
    for name, ax in pictures.items():
        file = tmp_path / f"{name}.png"
        ax.figure.savefig(file)
        assert file.stat().st_size > 1000
    pec, linear = (line.get_ydata() for line in pictures["curve"].get_lines())
    assert (pec >= linear).all()
    assert (pec > linear).any()  # the second phase of figure 3.6
    with pytest.raises(ValueError, match="eps"):
        plots.bounding_map(torch.rand(50))
    with pytest.raises(ValueError, match="x"):
        plots.bound_curve(model, points, y, [0.1])
