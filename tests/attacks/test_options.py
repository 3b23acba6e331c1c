"""Restarts, targets, losses, the best point, early stop, seeds, details and progress."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attack_helpers as h
import fastrobust as fr
from fastrobust import reference

EPS = 0.06


def _pgd(n: int = 120, **options: Any) -> Any:
    x, y = h.digits_batch(n)
    options = {"eps": EPS, "steps": 6, "seed": 1, **options}
    return fr.attacks.pgd(options.pop("model", h.digits_model()), x, y, **options)


def _details(n: int = 120, **options: Any) -> fr.attacks.AttackResult:
    return _pgd(n, return_details=True, **options)


def _logits(adv: Tensor) -> Tensor:
    with torch.no_grad():
        return h.digits_model()(adv)


LOSSES = {
    "ce": reference.losses.cross_entropy,
    "margin": reference.losses.margin_loss,
    "dlr": reference.losses.dlr_loss,
    "own": lambda z, y: F.multi_margin_loss(z, y, reduction="none"),
}


@pytest.mark.parametrize("name", ["ce", "margin", "dlr"])
def test_named_losses_are_the_plain_ones(name: str) -> None:
    """By name and as a differentiable callable in double precision: the same examples."""
    x, y = h.digits_batch(60)
    model, start = copy.deepcopy(h.digits_model()).double(), fr.ops.random_start(h.digits_batch(60)[0], EPS, seed=1)
    loss = lambda z, t, reduction: LOSSES[name](z, t).sum()
    plain = h.plain_pgd(model, x, y, start, EPS, 0.02, 3, h.INF, loss)[-1]
    gap = (_pgd(60, loss=name, steps=3, step_size=0.02).double() - plain).abs().flatten(1).amax(1)
    assert (gap > 1e-6).double().mean().item() <= 0.04
    assert not torch.equal(_pgd(60, loss=name, steps=3), _pgd(60, loss="kl", steps=3))


def test_aliases_and_callables() -> None:
    assert torch.equal(_pgd(loss="cw"), _pgd(loss="margin"))
    assert torch.equal(_pgd(loss="cross_entropy"), _pgd(loss="ce"))
    assert torch.equal(_pgd(loss="trades"), _pgd(loss="kl"))
    each = _pgd(loss=LOSSES["margin"])
    assert (each - _pgd(loss="margin")).abs().flatten(1).amax(1).le(1e-6).double().mean().item() >= 0.97
    assert torch.equal(each, _pgd(loss=lambda z, y: LOSSES["margin"](z, y).sum()))


def test_kl_ascends_the_divergence_from_the_clean_prediction() -> None:
    x, _ = h.digits_batch(40)
    clean = _logits(x)
    divergence = lambda adv: reference.losses.kl_divergence(_logits(adv), clean)
    adv = _pgd(40, loss="kl", steps=10)
    start = fr.ops.random_start(x, EPS, seed=1)
    assert bool((divergence(adv) >= divergence(start)).double().mean() >= 0.95)
    assert divergence(adv).mean().item() > 10 * divergence(start).mean().item()


@pytest.mark.parametrize("loss", ["ce", "margin", LOSSES["own"]], ids=["ce", "margin", "own"])
def test_targeted_reaches_the_class(loss: Any) -> None:
    x, y = h.digits_batch(80)
    aim = (y + 3) % 10
    options = {"eps": 0.3, "steps": 20, "seed": 0, "loss": loss}
    adv = fr.attacks.pgd(h.digits_model(), x, aim, targeted=True, **options)
    hit = (_logits(adv).argmax(1) == aim).double().mean().item()
    assert hit > 0.8 and (_logits(x).argmax(1) == aim).double().mean().item() < 0.1
    found = fr.attacks.pgd(h.digits_model(), x, aim, targeted=True, return_details=True, **options)
    assert torch.equal(found.fooled, _logits(adv).argmax(1) == aim)


def test_targeted_is_descent() -> None:
    x, y = h.digits_batch(30)
    aim = (y + 1) % 10
    leaf = x.clone().double().requires_grad_()
    model = copy.deepcopy(h.digits_model()).double()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), aim, reduction="sum"), leaf)
    for norm in h.NORMS:
        eps = h.RADIUS[norm]
        plain = h.plain_step(x.double(), x.double(), -g, eps, eps, norm)
        ours = fr.attacks.fgsm(h.digits_model(), x, aim, eps=eps, norm=norm, targeted=True)
        assert (ours.double() - plain).abs().flatten(1).amax(1).gt(2e-6).double().mean().item() <= 0.04


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("targets", ["all", 3, "tensor"])
def test_multi_targeted(loss: str, targets: Any) -> None:
    _, y = h.digits_batch(60)
    runs = {"all": 9, 3: 3, "tensor": 2}[targets]
    if targets == "tensor":
        targets = torch.stack([(y + 1) % 10, (y + 5) % 10], 1)
    found = _details(60, targets=targets, loss=loss)
    logits = _logits(found.adv)
    _, y = h.digits_batch(60)
    assert torch.equal(found.fooled, logits.argmax(1) != y)
    assert (found.loss - reference.losses.margin_loss(logits, y)).abs().max().item() <= 1e-4
    assert found.queries <= 1 + runs * 7
    alone = _details(60, targets=1, loss=loss)
    if runs != 2:  # more targets never lose an example that the first target fools
        assert bool((found.fooled >= alone.fooled).all())


def test_targets_all_is_as_strong_as_every_class_by_hand() -> None:
    x, y = h.digits_batch(40)
    found = _details(40, targets="all", random_start=False)
    by_hand = torch.zeros(40, dtype=torch.bool)
    for shift in range(1, 10):
        adv = fr.attacks.pgd(h.digits_model(), x, (y + shift) % 10, eps=EPS, steps=6, targeted=True, random_start=False)
        by_hand |= _logits(adv).argmax(1) != y
    assert torch.equal(found.fooled, by_hand)


def test_restarts_only_help_and_skip_the_fooled() -> None:
    model = h.Watch(h.digits_model())
    one, many = _details(), _details(restarts=4, model=model)
    assert bool((many.fooled >= one.fooled).all())
    left = int((~one.fooled).sum())
    assert model.sizes[:7] == [120] * 7 and model.sizes[7:14] == [left] * 7 and left < 120
    assert model.sizes == sorted(model.sizes, reverse=True)
    assert torch.equal(many.adv[one.fooled], one.adv[one.fooled])
    rest = ~one.fooled & ~many.fooled
    assert bool((many.loss[rest] >= one.loss[rest] - 1e-5).all())


@pytest.mark.parametrize("norm", [h.INF, 2, 1])
def test_a_data_set_attacked_in_batches_gets_the_starts_of_one_piece(norm: float) -> None:
    x, y = h.digits_batch(50)
    settings: dict[str, Any] = {"eps": EPS, "steps": 0, "seed": 3, "norm": norm}
    whole = fr.attacks.pgd(h.digits_model(), x, y, **settings)
    parts = [
        fr.attacks.pgd(h.digits_model(), x[i : i + 17], y[i : i + 17], first_example=i, **settings)
        for i in range(0, 50, 17)
    ]
    assert torch.equal(torch.cat(parts), whole)
    again = fr.attacks.pgd(h.digits_model(), x[17:34], y[17:34], **settings)
    assert not torch.equal(again, whole[17:34])
    for bad, error in ((-1, ValueError), (1.5, TypeError), (2**32, ValueError)):
        with pytest.raises(error, match="first_example"):
            fr.attacks.pgd(h.digits_model(), x, y, first_example=bad, **settings)


def test_restarts_are_new_starts_of_one_seed() -> None:
    runs = [_pgd(seed=s, steps=0) for s in (1, 2)]
    assert not torch.equal(*runs)
    x, _ = h.digits_batch(120)
    assert torch.equal(runs[0], fr.ops.random_start(x, EPS, seed=1))
    assert torch.equal(_pgd(restarts=3), _pgd(restarts=3)) and not torch.equal(
        _pgd(restarts=3), _pgd(restarts=3, seed=9)
    )


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl"])
@pytest.mark.parametrize("step_size", [None, 0.08], ids=["default step", "coarse step"])
def test_best_is_never_worse_than_last(loss: str, step_size: float | None) -> None:
    last = _details(loss=loss, step_size=step_size)
    best = _details(loss=loss, step_size=step_size, keep="best")
    assert bool((best.fooled >= last.fooled).all())
    same = best.fooled == last.fooled
    assert bool((best.loss[same] >= last.loss[same] - 1e-5).all())
    if step_size is not None:  # coarse steps overshoot, so there is something to gain
        assert bool((best.loss[same] > last.loss[same] + 1e-4).any())


def test_early_stop_fools_the_same_and_shrinks_the_batch() -> None:
    model = h.Watch(h.digits_model())
    full, early = _details(keep="best", steps=10), _details(steps=10, early_stop=True, model=model)
    assert torch.equal(full.fooled, early.fooled) and bool(early.fooled.any()) and not bool(early.fooled.all())
    assert model.sizes[0] == 120 and model.sizes == sorted(model.sizes, reverse=True)
    assert model.sizes[-1] == int((~early.fooled).sum()) < 120
    assert torch.equal(_logits(early.adv).argmax(1) != h.digits_batch(120)[1], early.fooled)
    h.assert_inside(early.adv, h.digits_batch(120)[0], EPS, h.INF)


def test_early_stop_ends_when_all_are_fooled() -> None:
    model = h.Watch(h.digits_model())
    found = _details(eps=1.0, steps=50, early_stop=True, model=model)
    assert bool(found.fooled.all()) and len(model.sizes) < 50


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": "best"},
        {"early_stop": True},
        {"restarts": 2},
        {"loss": "margin"},
        {"loss": "dlr", "norm": 2, "eps": 0.6},
    ],
    ids=str,
)
def test_details_are_those_of_the_returned_points(options: dict[str, Any]) -> None:
    model = h.Watch(h.digits_model())
    found = _details(**options, model=model)
    _, y = h.digits_batch(120)
    logits = _logits(found.adv)
    assert torch.equal(found.fooled, logits.argmax(1) != y)
    loss = LOSSES[options.get("loss", "ce")](logits, y)
    assert (found.loss - loss).abs().max().item() <= 1e-4
    assert found.queries == len(model.sizes)
    assert torch.equal(found.adv, _pgd(**options))


def test_own_predictions_when_no_labels_come() -> None:
    x, _ = h.digits_batch(60)
    model = h.digits_model()
    call = lambda y: fr.attacks.pgd(model, x, y, eps=EPS, seed=0)
    assert torch.equal(call(None), call(_logits(x).argmax(1)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_label_dtypes(dtype: torch.dtype) -> None:
    x, y = h.digits_batch(20)
    call = lambda y: fr.attacks.pgd(h.digits_model(), x, y, eps=EPS, seed=0)
    assert torch.equal(call(y.to(dtype)), call(y))


def test_seeds() -> None:
    assert torch.equal(_pgd(seed=3), _pgd(seed=3))
    assert not torch.equal(_pgd(seed=3), _pgd(seed=4))
    torch.manual_seed(8)
    first = _pgd(seed=None)
    second = _pgd(seed=None)
    torch.manual_seed(8)
    assert torch.equal(first, _pgd(seed=None)) and not torch.equal(first, second)


@pytest.mark.parametrize("norm", h.NORMS)
def test_an_example_does_not_depend_on_the_rest_of_the_batch(norm: float) -> None:
    """The first rows of a larger batch are those of a smaller one; the model sums alike for both."""
    x, y = h.digits_batch(40)
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = lambda t: (t.flatten(1).double()[:, None] * weight).cumsum(2)[:, :, -1].float().tanh()
    call = lambda n: fr.attacks.pgd(model, x[:n], y[:n], eps=h.RADIUS[norm], norm=norm, seed=2, steps=5)
    whole = call(40)
    for n in (1, 7, 16):
        assert torch.equal(call(n), whole[:n])
    eps = h.RADIUS[norm]
    parts = [fr.ops.random_start(x[i : i + 8], eps, norm, seed=2, first_example=i) for i in range(0, 40, 8)]
    assert torch.equal(torch.cat(parts), fr.ops.random_start(x, eps, norm, seed=2))


@pytest.mark.parametrize(("options", "total"), [({}, 6), ({"restarts": 2}, 12), ({"targets": 3}, 18)])
def test_progress_bar(options: dict[str, Any], total: int, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = _pgd(20, **options)
    assert capsys.readouterr().err == ""
    assert torch.equal(_pgd(20, progress=True, **options), wanted)
    assert f"/{total} " in capsys.readouterr().err


def test_cuda_graph_on_the_cpu_warns_and_runs() -> None:
    with pytest.warns(UserWarning, match="cuda_graph: the images are on cpu; running eagerly"):
        adv = _pgd(20, cuda_graph=True)
    assert torch.equal(adv, _pgd(20))
    with pytest.warns(UserWarning, match="cuda_graph: one run with keep='last'"):
        _pgd(20, cuda_graph=True, restarts=2)
