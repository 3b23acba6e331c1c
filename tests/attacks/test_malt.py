"""MALT's order against a Jacobian, and what is attacked in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks._model import Victim
from fastrobust.attacks._rank import malt_order, malt_targets

DUAL = {h.INF: 1, 2: 2, 1: h.INF}


def _model(classes: int) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(30, 40), nn.GELU(), nn.Linear(40, classes)).eval()


def _wanted(model: nn.Module, x: Tensor, y: Tensor, norm: float, candidates: int) -> Tensor:
    """The order from the whole Jacobian in float64."""
    out = []
    model = model.double()
    for row, label in zip(x.double(), y.tolist(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda t: model(t[None])[0], row).flatten(1)
        z = model(row[None])[0].detach()
        likely = [c for c in z.argsort(descending=True).tolist() if c != label][:candidates]
        far = {c: float((z[label] - z[c]).abs() / (jacobian[label] - jacobian[c]).norm(p=DUAL[norm])) for c in likely}
        out.append(sorted(likely, key=far.__getitem__))
    model.float()
    return torch.tensor(out)


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize(("classes", "candidates"), [(12, 100), (60, 15), (2, 100)])
def test_order_is_that_of_the_jacobian(norm: float, classes: int, candidates: int) -> None:
    model, x = _model(classes), torch.rand(9, 30, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    leaf, z = Victim(model, None, None, x).differentiable(x)
    found, passes = malt_order(leaf, z, y, classes, norm, candidates)
    wanted = _wanted(model, x, y, norm, candidates)
    assert passes == min(classes - 1, candidates) and torch.equal(found, wanted)
    if candidates == 100:
        few, _ = malt_targets(Victim(model, None, None, x), x, y, 3, norm)
        assert torch.equal(few, wanted[:, :3])


@pytest.mark.parametrize("norm", h.NORMS)
def test_malt_is_apgd_on_these_targets(norm: float) -> None:
    x, y = h.digits_batch(24)
    model, eps = h.digits_model(), h.RADIUS[norm]
    chosen, _ = malt_targets(Victim(model, None, None, x), x, y, 2, norm)
    found = fr.attacks.malt(model, x, y, eps=eps, norm=norm, targets=2, steps=10, seed=5, return_details=True)
    wanted = fr.attacks.apgd(
        model, x, y, eps=eps, norm=norm, targets=chosen, loss="dlr", steps=10, seed=5, return_details=True
    )
    assert torch.equal(found.adv, wanted.adv) and torch.equal(found.fooled, wanted.fooled)
    assert found.queries == wanted.queries + 1
    h.assert_inside(found.adv, x, eps, norm)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert int(found.fooled.sum()) > int((model(x).argmax(1) != y).sum())


def test_good_targets_first() -> None:
    """One class is near though its logit is small: the steep one. The likeliest one is flat, and out of reach."""
    weight = torch.zeros(5, 30)
    weight[1], weight[2, :2], weight[3], weight[4] = 0.0, 0.05, 2.0, 0.01
    model = nn.Linear(30, 5)
    with torch.no_grad():
        model.weight.copy_(weight)
        model.bias.copy_(torch.tensor([0.0, -1.0, -0.4, -33.0, -2.0]))
    x, y = torch.full((3, 30), 0.5), torch.zeros(3, dtype=torch.long)
    assert model(x).argsort(descending=True)[0].tolist()[1] == 2
    assert fr.attacks.malt(model, x, y, eps=0.2, targets=1, steps=10, return_details=True).fooled.all()
    assert not fr.attacks.apgd(model, x, y, eps=0.2, targets=1, loss="dlr", steps=10, return_details=True).fooled.any()


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes(classes: int) -> None:
    model, x = _model(classes), torch.rand(9, 30, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    with pytest.warns(fr.attacks.AttackWarning, match=f"needs 4 classes, the model has {classes}"):
        found = fr.attacks.malt(model, x, y, eps=0.5, steps=10, return_details=True)
    assert bool(found.fooled.any()) and torch.equal(found.fooled, model(found.adv).argmax(1) != y)


@pytest.mark.parametrize("bad", [{"y": torch.tensor([0, 12, 1])}, {"candidates": 0}, {"steps": -1}])
def test_bad_input(bad: dict[str, Any]) -> None:
    x, y = h.digits_batch(3)
    with pytest.raises(ValueError, match=next(iter(bad))):
        fr.attacks.malt(h.digits_model(), x, bad.pop("y", y), eps=0.1, **bad)


def test_masked_pixels_do_not_count() -> None:
    model, x = _model(6), torch.rand(5, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    fixed = torch.zeros_like(x, dtype=torch.bool)
    fixed[..., :3, :] = True
    leaf, z = Victim(model, None, None, x).differentiable(x)
    found, _ = malt_order(leaf, z, y, 5, math.inf, fixed=fixed)
    part = nn.Sequential(nn.Flatten(), _Rest(model, x)).eval()
    rest = x[..., 3:, :].flatten(1)
    wanted = torch.cat([_wanted(part[1].at(b), rest[b : b + 1], y[b : b + 1], math.inf, 5) for b in range(5)])
    assert torch.equal(found, wanted)


class _Rest(nn.Module):
    """The model as a function of the pixels that may change, the others as they are in one example."""

    def __init__(self, model: nn.Module, x: Tensor, b: int = 0) -> None:
        super().__init__()
        self.model, self.x, self.b = model, x, b

    def at(self, b: int) -> _Rest:
        return _Rest(self.model, self.x, b)

    def forward(self, rest: Tensor) -> Tensor:
        top = self.x[self.b : self.b + 1, :, :3, :].flatten(1).to(rest.dtype).expand(len(rest), -1)
        return self.model(torch.cat([top, rest], 1))
