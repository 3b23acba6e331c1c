"""The engine's options pass through every certificate, and bad ones are named before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.cli import main

OPTIONS = [{}, {"refine": "all"}, {"exact_input": True}, {"refine": "all", "exact_input": True}]


def network(inputs: int = 16, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, classes)
    ).eval()


def images(model: nn.Module, count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Many pixels on the faces of the box, where ball and box differ most."""
    x = torch.rand(count, 16, generator=torch.Generator().manual_seed(5)).mul(3).sub(1).clamp(0, 1)
    return x, model(x).argmax(1)


def envelope(model, x, y, **options):
    return fr.certify.polyhedral_envelope(model, x, y, 0.6, norm=2, clip=(0, 1), **options).radius


def search(model, x, y, **options):
    return fr.certify.search_radius(model, x, y, high=4.0, tol=1e-3, norm=2, clip=(0, 1), **options).radius


def bisection(model, x, y, **options):
    return search(model, x, y, strategy="bisection", **options)


def region(model, x, y, **options):
    return fr.certify.nonuniform_radius(model, x, y, norm=2, clip=(0, 1), iterations=20, **options).uniform


@pytest.mark.parametrize("certificate", (envelope, search, bisection, region))
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("refine", "some", ValueError),
        ("exact_input", "yes", TypeError),
        ("max_memory", 0, ValueError),
        ("max_memory", 1.5, ValueError),
        ("rounding", "up", ValueError),
    ],
)
def test_bad_values_are_named(certificate, name, value, error):
    model = network()
    x, y = images(model, 2)
    for count in (2, 0):
        with pytest.raises(error, match=f"{name}: got"):
            certificate(model, x[:count], y[:count], **{name: value})


@pytest.mark.parametrize("certificate", (bisection, region))
@pytest.mark.parametrize("options", OPTIONS)
def test_a_radius_is_certified_by_the_bounds_of_its_options(certificate, options):
    model = network()
    x, y = images(model)
    radius = certificate(model, x, y, **options).detach()
    assert bool((radius > 0).all())

    def proved(eps):
        bounds = fr.bounds.compute_bounds(
            model, x, eps, norm=2, clip=(0, 1), method="fast-lin", labels=y, sides="lower", **options
        )
        return bounds.lower.amin(1) > 0

    assert bool(proved(radius * (1 - 1e-5)).all())
    inside = radius < 0.99  # a region is not wider than the box
    assert bool(inside.any())
    assert not bool(proved(radius * 1.02 + 2e-3)[inside].any())


@pytest.mark.parametrize("certificate", (envelope, search, bisection, region))
def test_exact_bounds_of_the_first_layer_certify_more(certificate):
    model = network()
    x, y = images(model)
    plain = certificate(model, x, y, refine="all").detach()
    exact = certificate(model, x, y, refine="all", exact_input=True).detach()
    assert bool((exact >= plain - 2e-3).all())
    assert exact.mean() > 1.01 * plain.mean()


def test_chunks_of_rows_change_nothing():
    model = network()
    x, y = images(model)
    torch.testing.assert_close(envelope(model, x, y, max_memory=1), envelope(model, x, y), rtol=1e-5, atol=1e-6)


def test_the_command_passes_them_on(tmp_path):
    model = network()
    x, y = images(model)
    np.savez(tmp_path / "data.npz", test_images=x.numpy(), test_labels=y.numpy())
    torch.save(model, tmp_path / "model.pt")
    base = [
        "certify",
        "--model",
        str(tmp_path / "model.pt"),
        "--trust",
        "--data",
        str(tmp_path / "data.npz"),
        "--norm",
        "2",
        "--no-progress",
    ]
    for options, flags in zip(
        OPTIONS, ([], ["--refine", "all"], ["--exact-input"], ["--refine", "all", "--exact-input"]), strict=True
    ):
        for mode, want in ((["--eps", "0.6"], envelope), (["--high", "4", "--tol", "1e-3"], search)):
            out = tmp_path / "r.npz"
            assert main([*base, *mode, *flags, "--out", str(out)]) == 0
            np.testing.assert_allclose(
                np.load(out)["radius"], want(model, x, y, **options).detach(), rtol=1e-5, atol=1e-6
            )
