"""Masks, pixels of so many levels, tolerances, and boxes and radii that broadcast: exact contracts."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import AttackWarning, _grid

EPS = {h.INF: 0.1, 2: 0.7, 1: 2.3}
RUNS: list[dict[str, Any]] = [
    {},
    {"keep": "best"},
    {"restarts": 2},
    {"early_stop": True},
    {"targets": 2},
    {"steps": 0},
    {"loss": "kl"},
]
each_run = pytest.mark.parametrize("run", RUNS, ids=str)


def _pgd(x: Tensor, y: Tensor, **options: Any) -> Any:
    return fr.attacks.pgd(h.small_model(), x, y, **{"steps": 4, "seed": 0, **options})


MASKS = {
    "pixels": lambda x: torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5,
    "a patch": lambda x: (torch.arange(5) < 3) & (torch.arange(6) < 2)[:, None],
    "channels": lambda x: torch.tensor([True, False]).view(2, 1, 1).numpy(),
    "examples": lambda x: (torch.arange(7) % 2 == 0).view(7, 1, 1, 1),
}


@each_run
@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("kind", list(MASKS))
def test_masked_pixels_come_back_bit_for_bit(kind: str, norm: float, run: dict[str, Any]) -> None:
    x, y = h.small_batch()
    mask = MASKS[kind](x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        adv = _pgd(x, y, eps=EPS[norm], norm=norm, mask=mask, **run)
    free = torch.as_tensor(mask).expand(x.shape)
    assert torch.equal(adv[~free], x[~free])
    assert bool((adv != x)[free].any())
    h.assert_inside(adv, x, EPS[norm], norm)


@pytest.mark.parametrize("norm", h.NORMS)
def test_a_masked_step_is_that_of_the_free_pixels(norm: float) -> None:
    """The radius is spent on them alone."""
    x, y = h.small_batch()
    free = MASKS["a patch"](x).expand(x.shape)
    leaf = x.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(h.small_model().double()(leaf), y, reduction="sum")
    (g,) = torch.autograd.grad(loss, leaf)
    plain = h.plain_step(x.double(), x.double(), g * free, EPS[norm], EPS[norm], norm)
    adv = fr.attacks.fgsm(h.small_model(), x, y, eps=EPS[norm], norm=norm, mask=free)
    assert (adv.double() - plain).abs().max().item() <= 2e-6


def test_a_full_mask_changes_nothing() -> None:
    x, y = h.small_batch()
    assert torch.equal(_pgd(x, y, eps=0.1, mask=torch.ones(5, dtype=torch.bool)), _pgd(x, y, eps=0.1))


def _pixels(n: int = 7, levels: int = 256, lo: float = 0.0, hi: float = 1.0, dtype: Any = torch.float32) -> Tensor:
    """As torchvision reads them for (0, 1) and 256."""
    k = torch.randint(0, levels, (n, 2, 6, 5), generator=torch.Generator().manual_seed(3))
    k[:, 0, 0], k[:, 0, 1] = 0, levels - 1
    return (lo + k.double() * (hi - lo) / (levels - 1)).to(dtype)


@each_run
@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("radius", ["one", "each"])
def test_eight_bit_results_are_exact_pixels_in_the_exact_ball(norm: float, run: dict[str, Any], radius: str) -> None:
    x, (_, y) = _pixels(), h.small_batch()
    eps: Any = {h.INF: 8 / 255, 2: 0.3, 1: 1.5}[norm]
    if radius == "each":
        eps = eps * torch.linspace(0, 1.5, 7)
    adv = _pgd(x, y, eps=eps, norm=norm, levels=256, **run)
    bytes_ = (adv * 255).round().to(torch.uint8)
    assert torch.equal(bytes_.float() / 255, adv)  # what a file gives back is what was attacked
    h.assert_inside(adv, x, eps, norm)
    if run.get("loss") != "kl" or norm == h.INF:
        far = h.distance(adv, x, norm) / (eps.double() if isinstance(eps, Tensor) else eps)
        assert far[3].item() > (0.4 if "early_stop" in run or "steps" in run else 0.8)


@pytest.mark.parametrize("norm", h.NORMS)
def test_details_are_those_of_the_pixels(norm: float) -> None:
    x, (_, y) = _pixels(), h.small_batch()
    model = h.small_model()
    for run in ({}, {"keep": "best"}, {"restarts": 2}):
        found = _pgd(x, y, eps=EPS[norm] / 2, norm=norm, levels=256, return_details=True, **run)
        with torch.no_grad():
            assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)


def test_the_model_sees_pixels_only() -> None:
    x, (_, y) = _pixels(), h.small_batch()
    net, seen = h.small_model(), []
    fr.attacks.pgd(lambda t: (seen.append(t.detach().clone()), net(t))[1], x, y, eps=0.1, levels=256, steps=3)
    assert len(seen) == 3 and all(torch.equal((t * 255).round() / 255, t) for t in seen)


def test_small_perturbations_do_not_vanish_by_rounding() -> None:
    """L2 radius of 3 levels over 60 pixels: less than half a level each, where rounding each would leave nothing."""
    x, (_, y) = _pixels(), h.small_batch()
    adv = _pgd(x, y, eps=3 / 255, norm=2, levels=256, steps=10)
    length = h.distance(adv, x, 2) * 255
    assert bool(((length > 2) & (length <= 3)).all())


@pytest.mark.parametrize("norm", h.NORMS)
def test_snap_against_search(norm: float) -> None:
    """Grid, inside, between the neighbours of x; norm inf: the nearest such point."""
    values = _grid.table(17, 0.0, 1.0, torch.float32, torch.zeros(()))
    rng = torch.Generator().manual_seed(0)
    for _ in range(40):
        x0 = values[torch.randint(0, 17, (5, 6), generator=rng)]
        eps = float(torch.rand((), generator=rng)) * 0.4
        x = fr.ops.random_start(x0, eps, norm, seed=int(torch.randint(0, 1000, (), generator=rng)))
        got = _grid.snap(x, x0, values, eps, norm)
        assert bool(torch.isin(got, values).all()) and bool(((got - x).abs() < 1 / 16).all())
        h.assert_inside(got, x0, eps, norm)
        if norm == h.INF:
            allowed = (values.double()[:, None, None] - x0.double()).abs() <= eps
            gap = torch.where(allowed, (values.double()[:, None, None] - x.double()).abs(), math.inf).amin(0)
            assert bool(((got.double() - x.double()).abs() <= gap + 1e-7).all())


@pytest.mark.parametrize("levels", [2, 16, 256])
@pytest.mark.parametrize("clip", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.1, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_grids(levels: int, clip: tuple[float, float], dtype: Any) -> None:
    if dtype == torch.float16 and clip == (0.1, 0.9):
        pytest.skip("a half cannot hold the faces of this box")
    width = clip[1] - clip[0]
    x = _pixels(levels=levels, lo=clip[0], hi=clip[1], dtype=dtype).clamp(*clip)
    model = h.small_model().double() if dtype == torch.float64 else h.small_model()
    options: dict[str, Any] = {
        "eps": 1.2 * width / (levels - 1),
        "clip": clip,
        "levels": levels,
        "seed": 0,
        "tolerance": 1e-6,
    }
    adv = fr.attacks.pgd(model, x, torch.arange(7) % 5, normalize=(clip[0], width), **options)
    h.assert_inside(adv, x, options["eps"], h.INF, clip)
    k = (adv.double() - clip[0]) / width * (levels - 1)
    assert bool(((k - k.round()).abs() < (0.2 if dtype == torch.float16 else 1e-3)).all())
    assert bool((adv != x).flatten(1).any(1).all())


def test_pixel_units_are_exact() -> None:
    """In units of 1/255 nothing rounds: all eight levels are reached."""
    x = (_pixels() * 255).round()
    adv = _pgd(x, torch.arange(7) % 5, eps=8, clip=(0, 255), levels=256, normalize=(0, 255), steps=10)
    assert torch.equal(adv, adv.round()) and (adv - x).abs().max().item() == 8


def test_a_radius_below_one_level_is_warned_of() -> None:
    x = _pixels()
    with pytest.warns(AttackWarning, match=r"eps: got 0.003, less than one of levels' steps"):
        adv = _pgd(x, torch.arange(7) % 5, eps=0.003, levels=256)
    assert torch.equal(adv, x)


def test_tolerance_clamps_and_rounds() -> None:
    x, y = h.small_batch()
    off = x + torch.where(x == 1, 2e-7, 0) - torch.where(x == 0, 3e-8, 0)
    assert off.max() > 1 and off.min() < 0
    assert torch.equal(_pgd(off, y, eps=0.1, tolerance=1e-6), _pgd(x, y, eps=0.1))
    with pytest.raises(
        ValueError, match=r"x: got values from -3e-08 to 1.000000\d, .*outside by 2.38e-07.*tolerance=1e-06"
    ):
        _pgd(off, y, eps=0.1)
    with pytest.raises(ValueError, match=r"x: got values from -0.5 to 0.5"):
        _pgd(x - 0.5, y, eps=0.1, tolerance=0.1)
    pixels = _pixels()
    with pytest.raises(ValueError, match=r"x: got values 1.\d*e-07 off the grid of levels = 256.*tolerance="):
        _pgd(torch.where(pixels > 0.5, pixels - 1.2e-7, pixels), y, eps=0.1, levels=256)
    near = torch.where(pixels > 0.5, pixels - 1.2e-7, pixels)
    assert torch.equal(_pgd(near, y, eps=0.1, levels=256, tolerance=1e-6), _pgd(pixels, y, eps=0.1, levels=256))


SPREAD: dict[str, tuple[Any, Any]] = {
    "list": ([0.1, 0.2, 0, 0.1, 0.3, 0.1, 0.1], (7, 1, 1, 1)),
    "numpy": (np.linspace(0, 0.3, 7), (7, 1, 1, 1)),
    "examples": (torch.linspace(0, 0.3, 7).view(7, 1, 1, 1), (7, 1, 1, 1)),
    "channels": (torch.tensor([0.1, 0.3]).view(2, 1, 1), (2, 1, 1)),
    "channels, numpy": (np.array([0.1, 0.3], dtype=np.float32).reshape(1, 2, 1, 1), (1, 2, 1, 1)),
    "one": (torch.full((1, 1, 1, 1), 0.2), (1, 1, 1, 1)),
}


@pytest.mark.parametrize("kind", list(SPREAD))
@pytest.mark.parametrize("attack", ["fgsm", "ifgsm", "pgd"])
@pytest.mark.parametrize("run", [{}, {"restarts": 3}, {"early_stop": True}], ids=str)
def test_radii_that_broadcast(kind: str, attack: str, run: dict[str, Any]) -> None:
    x, y = h.small_batch()
    eps, shape = SPREAD[kind]
    full = torch.as_tensor(eps, dtype=torch.float64).view(shape).expand(x.shape)
    call = lambda e: getattr(fr.attacks, attack)(h.small_model(), x, y, eps=e, seed=0, **run)
    adv = call(eps)
    h.assert_inside(adv, x, full, h.INF)
    assert (adv - call(full)).abs().max().item() <= 1e-6
    assert "early_stop" in run or bool(((adv.double() - x.double()).abs() > 0.9 * full).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(4, 2)}, "mask: got .*float32.*expected a bool"),
        ({"mask": torch.ones(3, 1, dtype=torch.bool)}, r"mask: got shape \(3, 1\), expected one that broadcasts"),
        ({"mask": torch.zeros(5, dtype=torch.bool)}, "mask: got no True"),
        ({"mask": 3}, "mask: got int 3, expected a tensor"),
        ({"levels": 1}, "levels: got 1, expected at least 2"),
        ({"levels": 256, "clip": None}, "clip: got None, expected two numbers"),
        ({"levels": 256}, "x: got values .* off the grid"),
        ({"tolerance": -1.0}, "tolerance: got -1.0, expected a finite number >= 0"),
        ({"tolerance": "a"}, "tolerance: got str 'a', expected a number"),
        ({"clip": "01"}, "clip: got str '01', expected"),
        ({"clip": (torch.zeros(4, 1, 1), torch.ones(4, 1, 1))}, r"clip: got shapes \(4, 1, 1\) and .*broadcast to x's"),
        ({"clip": (torch.ones(2, 1, 1), torch.zeros(2, 1, 1))}, "clip: got lo > hi"),
        ({"clip": (torch.zeros(2, 1, 1), torch.full((2, 1, 1), 0.5))}, "x: got values outside clip by up to 0.5"),
        ({"eps": [0.1, "a"]}, "eps: got list"),
        ({"eps": torch.full((3, 1, 1), 0.1)}, r"eps: got shape \(3, 1, 1\), expected a number"),
        ({"eps": torch.full((2, 1, 1), 0.1), "norm": 2}, "eps: got one value per element"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    x, y = h.small_batch()
    with pytest.raises((TypeError, ValueError), match=message):
        _pgd(x, y, **{"eps": 0.1, **options})
