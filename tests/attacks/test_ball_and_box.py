"""||adv - x|| <= eps and lo <= adv <= hi hold exactly, for every attack, norm, dtype and layout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks._inputs import narrow_inward

ATTACKS: dict[str, Callable[..., Any]] = {"fgsm": fr.attacks.fgsm, "ifgsm": fr.attacks.ifgsm, "pgd": fr.attacks.pgd}
HALF = [torch.float16, torch.bfloat16]
EPS = {h.INF: 0.1, 2: 0.7, 1: 2.3}


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize("size", [0, 1, 7])
def test_exact(attack: str, norm: float, size: int) -> None:
    x, y = h.small_batch(size)
    eps = EPS[norm]
    adv = ATTACKS[attack](h.small_model(), x, y, eps=eps, norm=norm)
    h.assert_inside(adv, x, eps, norm)
    if size:  # the radius is used
        assert h.distance(adv, x, norm).max().item() > 0.9 * eps


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_eps_zero_returns_x(attack: str, norm: float) -> None:
    x, y = h.small_batch()
    assert torch.equal(ATTACKS[attack](h.small_model(), x, y, eps=0, norm=norm), x)
    assert torch.equal(ATTACKS[attack](h.small_model(), x, y, eps=0.0, step_size=0.1, norm=norm), x)


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize(
    "options", [{}, {"restarts": 3}, {"early_stop": True}, {"keep": "best"}, {"targets": 2}], ids=str
)
def test_eps_per_example(norm: float, options: dict[str, Any]) -> None:
    x, y = h.small_batch()
    eps = EPS[norm] * torch.tensor([0, 0.1, 0.5, 1, 0.3, 0, 2])
    adv = fr.attacks.pgd(h.small_model(), x, y, eps=eps, norm=norm, seed=1, **options)
    h.assert_inside(adv, x, eps, norm)
    assert torch.equal(adv[eps == 0], x[eps == 0])
    near = h.distance(adv, x, norm) > 0.5 * eps.double()
    assert bool(near[3]) or options  # a full run uses its own radius


def test_one_eps_is_the_same_for_all() -> None:
    x, y = h.small_batch()
    call = lambda eps: fr.attacks.pgd(h.small_model(), x, y, eps=eps, seed=1, step_size=0.03)
    wanted = call(0.1)
    assert torch.equal(call(torch.tensor(0.1)), wanted) or call(torch.tensor(0.1)).sub(wanted).abs().max() <= 1e-7
    assert torch.equal(call(torch.full((7,), 0.1, dtype=torch.float64)), wanted)  # a float64 radius rounds down too
    assert torch.equal(call(torch.full(x.shape, 0.1, dtype=torch.float64)), wanted)


def test_eps_per_element() -> None:
    x, y = h.small_batch()
    eps = torch.rand(x.shape) * 0.2
    eps[:, 0, 0] = 0
    adv = fr.attacks.pgd(h.small_model(), x, y, eps=eps)
    h.assert_inside(adv, x, eps, h.INF)
    assert torch.equal(adv[:, 0, 0], x[:, 0, 0])


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, norm: float) -> None:
    x, y = h.small_batch()
    x = x.to(dtype)
    model = h.small_model()
    if dtype == torch.float64:
        model = model.double()
    adv = fr.attacks.pgd(model, x, y, eps=EPS[norm], norm=norm)
    h.assert_inside(adv, x, EPS[norm], norm)
    assert not torch.equal(adv, x)


@pytest.mark.parametrize("clip", [None, (0.25, 0.75), (-1.0, 2.0)])
@pytest.mark.parametrize("norm", h.NORMS)
def test_other_boxes(clip: tuple[float, float] | None, norm: float) -> None:
    x, y = h.small_batch()
    x = x * 0.5 + 0.25
    adv = fr.attacks.pgd(h.small_model(), x, y, eps=EPS[norm], norm=norm, clip=clip)
    h.assert_inside(adv, x, EPS[norm], norm, clip)
    if clip != (0.25, 0.75) and norm == h.INF:
        assert adv.min().item() < 0.25 or adv.max().item() > 0.75


def _finite(dtype: torch.dtype) -> Tensor:
    """Every finite value, in ascending order, zero once."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.unique(every[torch.isfinite(every)].float(), sorted=True)


def _oracle(x: np.ndarray, x0: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Nearest value of the grid to x that is not beyond x as seen from x0, found by search in exact float64."""
    below, above = np.searchsorted(grid, x, "right") - 1, np.searchsorted(grid, x, "left")
    down, up = grid[np.clip(below, 0, len(grid) - 1)], grid[np.clip(above, 0, len(grid) - 1)]
    toward = np.where(x0 <= x, down, up)
    return np.where(x0 == x, x, toward)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("near", [True, False], ids=["towards a neighbour", "towards zero or one"])
def test_narrowing_is_inward_for_every_half_value(dtype: torch.dtype, near: bool) -> None:
    """x between every two neighbouring half values: just past, in the middle, just before; seen from either side."""
    grid = _finite(dtype)
    low, high = grid[:-1], grid[1:]
    middle = ((low.double() + high.double()) / 2).float()
    points = [low, torch.nextafter(low, high), middle, torch.nextafter(high, low), high]
    for x in points:
        for x0 in (low, high) if near else (torch.zeros_like(x), torch.ones_like(x), -torch.ones_like(x)):
            got = narrow_inward(x, x0, dtype)
            assert got.dtype == dtype
            wide = got.double()
            within = (wide - x0.double()).abs() <= (x.double() - x0.double()).abs()
            assert bool(within.all())
            # the result is a neighbour of x, and between x0 and x
            between = (wide >= torch.minimum(x, x0).double()) & (wide <= torch.maximum(x, x0).double())
            assert bool(between.all())
            expected = _oracle(x.double().numpy(), x0.double().numpy(), grid.double().numpy())
            nearest = x.to(dtype).double().numpy()
            ok = (wide.numpy() == expected) | (wide.numpy() == nearest)
            assert ok.all()


@pytest.mark.parametrize("dtype", HALF)
def test_narrowing_is_exact_where_the_distance_rounds(dtype: torch.dtype) -> None:
    """x0 = 1 and x just above a tiny half value: both lie at the same float32 distance from x0, only one inside."""
    x0 = torch.ones(3)
    tiny = torch.tensor([2.0**-10, 2.0**-12, 2.0**-14]).to(dtype)
    x = torch.nextafter(tiny.float(), x0)
    got = narrow_inward(x, x0, dtype).double()
    assert bool((got >= x.double()).all())
    assert bool((got - x.double() <= tiny.double() * 2.0**-6).all())


@pytest.mark.parametrize("norm", [h.INF, 2])
def test_layouts(norm: float) -> None:
    x, y = h.small_batch()
    model, call = h.small_model(), {"eps": EPS[norm], "norm": norm, "seed": 4, "steps": 3}
    wanted = fr.attacks.pgd(model, x, y, **call)
    wide = torch.zeros(7, 2, 6, 10)
    wide[..., ::2] = x
    layouts = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": wide[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    for name, given in layouts.items():
        copy_of = given.clone()
        adv = fr.attacks.pgd(model, given, y, **call)
        h.assert_inside(adv, x, EPS[norm], norm)
        assert (adv - wanted).abs().max().item() <= 2e-6, name  # the model sums in another order
        assert torch.equal(given, copy_of)
    assert fr.attacks.pgd(model, layouts["channels_last"], y, **call).is_contiguous(memory_format=torch.channels_last)
    one = x[:1].expand(3, -1, -1, -1)
    h.assert_inside(fr.attacks.pgd(model, one, y[:3], **call), one, EPS[norm], norm)


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
@pytest.mark.parametrize("targets", [None, "all"])
def test_two_classes(loss: str, targets: str | None) -> None:
    if loss == "kl" and targets:
        pytest.skip("kl has no target class")
    x, y = h.small_batch(classes=2)
    found = fr.attacks.pgd(h.small_model(2), x, y, eps=0.3, loss=loss, targets=targets, return_details=True)
    h.assert_inside(found.adv, x, 0.3, h.INF)
    assert bool(found.fooled.any())


def test_normalize_is_a_wrapped_model() -> None:
    x, y = h.small_batch()
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3])
    model = h.small_model()
    wrapped = lambda t: model((t - mean[:, None, None]) / std[:, None, None])
    options = {"eps": 0.05, "seed": 3}
    wanted = fr.attacks.pgd(wrapped, x, y, **options)
    assert torch.equal(fr.attacks.pgd(model, x, y, normalize=(mean, std), **options), wanted)
    assert torch.equal(fr.attacks.pgd(model, x, y, normalize=([0.4, 0.5], [0.2, 0.3]), **options), wanted)
    assert not torch.equal(fr.attacks.pgd(model, x, y, **options), wanted)
    h.assert_inside(wanted, x, 0.05, h.INF)


@pytest.mark.parametrize("norm", h.NORMS)
def test_autocast_and_half_models(norm: float) -> None:
    """State, ball and box stay float32; the model alone is half."""
    x, y = h.digits_batch(32)
    model, eps = h.digits_model(), h.RADIUS[norm]
    half = copy.deepcopy(model).bfloat16()
    seen: list[torch.dtype] = []
    half[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    wanted = h.accuracy(model, fr.attacks.pgd(model, x, y, eps=eps, norm=norm, seed=0), y)
    for adv in (
        fr.attacks.pgd(model, x, y, eps=eps, norm=norm, seed=0, autocast=torch.bfloat16),
        fr.attacks.pgd(half, x, y, eps=eps, norm=norm, seed=0),
    ):
        h.assert_inside(adv, x, eps, norm)
        assert abs(h.accuracy(model, adv, y) - wanted) <= 20  # half precision weakens it little
    assert set(seen) == {torch.bfloat16}
    dtypes: list[torch.dtype] = []
    handle = model[0].register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
    fr.attacks.pgd(model, x, y, eps=eps, norm=norm, steps=1, autocast=torch.bfloat16)
    handle.remove()
    assert dtypes == [torch.bfloat16]


def test_nan_gradients_leave_other_examples_alone() -> None:
    x, y = h.small_batch()
    model = h.small_model()

    def broken(t: Tensor) -> Tensor:
        factor = torch.ones(len(t), 1)
        factor[2] = math.nan
        return model(t) * factor

    with pytest.warns(UserWarning, match="the loss of 1 of 7 examples was not finite"):
        adv = fr.attacks.pgd(broken, x, y, eps=0.1, norm=2, random_start=False)
    assert torch.equal(adv[2], x[2])
    rest = [0, 1, 3, 4, 5, 6]
    wanted = fr.attacks.pgd(model, x, y, eps=0.1, norm=2, random_start=False)
    assert (adv - wanted)[rest].abs().max().item() <= 1e-6
