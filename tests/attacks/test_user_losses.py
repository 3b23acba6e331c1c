"""Losses over any outputs, what fooled means, outputs to pick, and numbers of numpy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr

bce = F.binary_cross_entropy_with_logits


def _net(k: int, *, maps: bool = False) -> nn.Module:
    torch.manual_seed(k)
    if maps:
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, k, 1))
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 12), nn.Tanh(), nn.Linear(12, k))


def _tasks() -> dict[str, tuple[nn.Module, Tensor, Any, Any]]:
    """Model, targets, loss, and fooled where there is no default for it."""
    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (7,), generator=rng)
    many = torch.randint(0, 2, (7, 4), generator=rng)
    boxes = torch.rand(7, 4, generator=rng)
    dense = torch.randint(0, 3, (7, 6, 5), generator=rng)
    soft = torch.rand(7, 5, generator=rng).softmax(1)
    return {
        "one logit (B, 1)": (_net(1), bits, lambda z, t: bce(z[:, 0], t.float(), reduction="none"), None),
        "one logit (B,)": (
            nn.Sequential(_net(1), nn.Flatten(0)),
            bits.bool(),
            lambda z, t: bce(z, t.float(), reduction="none"),
            None,
        ),
        "one logit, labels (B, 1)": (
            _net(1),
            bits[:, None],
            lambda z, t: bce(z, t.float(), reduction="none")[:, 0],
            None,
        ),
        "many labels": (_net(4), many, lambda z, t: bce(z, t.float(), reduction="none").mean(1), None),
        "many labels, float": (
            _net(4),
            many.float(),
            lambda z, t: bce(z, t, reduction="none").mean(1),
            lambda z, t: ((z > 0) != (t > 0.5)).any(1),
        ),
        "regression": (_net(4), boxes, lambda z, t: (z - t).square().sum(1), lambda z, t: (z - t).abs().amax(1) > 0.9),
        "segmentation": (
            _net(3, maps=True),
            dense,
            lambda z, t: F.cross_entropy(z, t, reduction="none").mean((1, 2)),
            lambda z, t: (z.argmax(1) == t).double().mean((1, 2)) < 0.3,
        ),
        "soft labels": (
            _net(5),
            soft,
            lambda z, t: F.cross_entropy(z, t, reduction="none"),
            lambda z, t: z.argmax(1) != t.argmax(1),
        ),
        "ordinal classes beyond the outputs": (
            _net(3),
            torch.tensor([0, 1, 2, 3, 3, 2, 0]),
            lambda z, t: bce(z, (t[:, None] > torch.arange(3)).float(), reduction="none").sum(1),
            lambda z, t: (z > 0).sum(1) != t,
        ),
    }


TASKS = _tasks()
each_task = pytest.mark.parametrize("task", list(TASKS))


def _truth(task: str, adv: Tensor) -> Tensor:
    """Fooled, by the plain meaning."""
    model, y, _, fooled = TASKS[task]
    with torch.no_grad():
        z = model(adv)
    if fooled is not None:
        return fooled(z, y)
    return torch.tensor(
        [
            any((a > 0) != bool(b) for a, b in zip(z[i].flatten().tolist(), y[i].flatten().tolist(), strict=True))
            for i in range(7)
        ]
    )


@each_task
@pytest.mark.parametrize("attack", ["fgsm", "ifgsm", "pgd"])
def test_the_loss_alone_is_enough(task: str, attack: str) -> None:
    model, y, loss, _ = TASKS[task]
    x, _ = h.small_batch()
    targets = y.clone()
    adv = getattr(fr.attacks, attack)(model, x, y, eps=0.1, loss=loss)
    h.assert_inside(adv, x, 0.1, h.INF)
    with torch.no_grad():
        assert bool((loss(model(adv), y) > loss(model(x), y)).all())
        down = getattr(fr.attacks, attack)(model, x, y, eps=0.1, loss=loss, targeted=True)
        assert bool((loss(model(down), y) < loss(model(x), y)).all())
    assert torch.equal(y, targets)


@each_task
@pytest.mark.parametrize("run", [{}, {"early_stop": True}, {"keep": "best"}, {"restarts": 3}], ids=h.label)
@pytest.mark.parametrize("check", [True, False])
def test_fooled_is_what_it_says(task: str, run: dict[str, Any], check: bool) -> None:
    model, y, loss, fooled = TASKS[task]
    x, _ = h.small_batch()
    options: dict[str, Any] = {"eps": 0.15, "loss": loss, "fooled": fooled, "seed": 0, "check": check, **run}
    found = fr.attacks.pgd(model, x, y, return_details=True, **options)
    assert torch.equal(found.fooled, _truth(task, found.adv))
    with torch.no_grad():
        assert (found.loss - loss(model(found.adv), y)).abs().max().item() <= 1e-5
    if not run:
        reach = (
            fr.attacks.pgd(model, x, y, return_details=True, targeted=True, **{**options, "fooled": None})
            if fooled is None
            else None
        )
        assert reach is None or torch.equal(reach.fooled, ~_truth(task, reach.adv))


@pytest.mark.parametrize("run", [{"early_stop": True}, {"return_details": True}], ids=h.label)
@pytest.mark.parametrize("task", ["many labels, float", "regression", "segmentation", "soft labels"])
def test_what_has_no_plain_meaning_is_asked_for(task: str, run: dict[str, Any]) -> None:
    model, y, loss, _ = TASKS[task]
    x, _ = h.small_batch()
    with pytest.raises(ValueError, match=r"fooled: got None, expected a callable\(outputs, y\) giving \(B,\) bool"):
        fr.attacks.pgd(model, x, y, eps=0.1, loss=loss, **run)


def test_fooled_beside_a_named_loss() -> None:
    """Not among the two likeliest."""
    x, y = h.digits_batch(60)
    beyond = lambda z, t: ~(z.topk(2, 1).indices == t[:, None]).any(1)
    found = fr.attacks.pgd(
        h.digits_model(), x, y, eps=0.15, fooled=beyond, early_stop=True, return_details=True, seed=0
    )
    with torch.no_grad():
        assert torch.equal(found.fooled, beyond(h.digits_model()(found.adv), y)) and 0 < found.fooled.sum() < 60


def test_losses_may_write_into_what_they_get() -> None:
    x, y = h.small_batch()
    labels = y.clone()

    def loss(z: Tensor, t: Tensor) -> Tensor:
        t += 1
        t -= 1
        return F.cross_entropy(z.mul_(2.0), t, reduction="none")

    options: dict[str, Any] = {"eps": 0.1, "seed": 0, "return_details": True}
    ours = fr.attacks.pgd(h.small_model(), x, y, loss=loss, **options)
    plain = fr.attacks.pgd(
        h.small_model(), x, y, loss=lambda z, t: F.cross_entropy(2 * z, t, reduction="none"), **options
    )
    assert torch.equal(ours.adv, plain.adv) and torch.equal(ours.fooled, plain.fooled) and torch.equal(y, labels)
    wrecked = fr.attacks.pgd(h.small_model(), x, y, loss=lambda z, t: -t.zero_() + z.sum(1), eps=0.1)
    assert torch.equal(y, labels) and wrecked.shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": lambda z, t: F.cross_entropy(z, t), "keep": "best"},
            "loss: returned one number, expected one value per example",
        ),
        ({"loss": lambda z, t: F.cross_entropy(z, t), "restarts": 2}, "loss: returned one number"),
        ({"loss": lambda z, t: F.cross_entropy(z.detach(), t)}, "loss: returned a value without a gradient"),
        ({"fooled": 3}, "fooled: got int 3, expected a callable"),
        ({"fooled": lambda z, t: z, "return_details": True}, "fooled: returned .*expected a bool tensor"),
        ({"loss": lambda z, t: z.sum(1), "y": torch.rand(3)}, r"y: got shape \(3,\), expected \(7, ...\)"),
        ({"loss": lambda z, t: z.sum(1), "y": [1] * 7}, "y: got list"),
        ({"output": 1.5}, "output: got float 1.5"),
        ({"output": "scores"}, "output: got 'scores', but the model returned"),
    ],
    ids=h.label,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    x, y = h.small_batch()
    with pytest.raises((TypeError, ValueError), match=message):
        fr.attacks.pgd(h.small_model(), x, options.pop("y", y), eps=0.1, **options)


class _Answer(NamedTuple):
    logits: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    ("wrap", "output", "hint"),
    [
        (lambda z: (z * 0, z), 1, r"tuple of 2 \(\(7, 5\) torch.float32.*; pick one, say output=0"),
        (lambda z: [z], -1, "list of 1"),
        (
            lambda z: {"logits": z, "h": z * 0},
            "logits",
            "dict with keys 'logits', 'h'.*; pick one, say output='logits'",
        ),
        (lambda z: _Answer(z, z * 0), "logits", "_Answer of 2"),
        (lambda z: z[:, :, None], lambda out: out[..., 0], r"\(7, 5, 1\)"),
    ],
    ids=["tuple", "list", "dict", "attribute", "callable"],
)
def test_outputs_to_pick(wrap: Any, output: Any, hint: str) -> None:
    x, y = h.small_batch()
    net = h.small_model()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor) -> Any:
            return wrap(self.net(t))

    wanted = fr.attacks.pgd(net, x, y, eps=0.1, seed=0)
    assert torch.equal(fr.attacks.pgd(Wrapped(), x, y, eps=0.1, seed=0, output=output), wanted)
    with pytest.raises(ValueError, match=f"model: returned {hint}"):
        fr.attacks.pgd(Wrapped(), x, y, eps=0.1)


@torch.no_grad()
def _under_no_grad(t: Tensor) -> Tensor:
    return _net(5)(t)


@torch.inference_mode()
def _under_inference_mode(t: Tensor) -> Tensor:
    return _net(5)(t)


def _made_under_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return _net(5)


@pytest.mark.parametrize("loss", ["ce", "kl", lambda z, t: F.cross_entropy(z, t, reduction="none")], ids=h.label)
@pytest.mark.parametrize(
    "model",
    [
        _under_no_grad,
        _under_inference_mode,
        lambda t: _net(5)(t.detach()),
        lambda t: _net(5)(torch.tensor(t.tolist())),
        lambda t: _net(5)((t > 0.5).float()),
        lambda t: _net(5)((t * 255).byte() / 255),
        lambda t: _net(5)(t.detach()).requires_grad_(),
        lambda t: torch.full((len(t), 5), 0.5).requires_grad_(),
        _made_under_inference_mode(),
        lambda t: F.one_hot(_net(5)(t).argmax(1), 5).float(),
        lambda t: _net(5)(torch.from_numpy(2 * t.numpy())),
        lambda t: torch.utils.checkpoint.checkpoint(_net(5), t, use_reentrant=True),
    ],
    ids=[
        "no_grad",
        "inference_mode",
        "detach",
        "lists",
        "threshold",
        "bytes",
        "leaf",
        "constant",
        "inference weights",
        "argmax",
        "numpy",
        "reentrant checkpoint",
    ],
)
def test_models_without_a_gradient(model: Any, loss: Any) -> None:
    x, y = h.small_batch()
    with pytest.raises(
        ValueError, match="^model: (returned logits without a gradient to its input|has inference tensors)"
    ):
        fr.attacks.pgd(model, x, y, eps=0.1, loss=loss)
    if loss == "ce" and not isinstance(model, nn.Module):
        assert fr.attacks.pgd(model, x, y, eps=0.1, steps=0, return_details=True).fooled.shape == (
            7,
        )  # no gradient needed


def test_integers_of_any_kind() -> None:
    x, y = h.small_batch()
    call = lambda **k: fr.attacks.pgd(h.small_model(), x, y, eps=0.1, **{"steps": 3, "seed": 5, **k})
    for kind in (np.int64, np.int32, np.uint8, lambda v: np.array([v])[0], torch.tensor):
        for name, value in (
            ("steps", 3),
            ("restarts", 2),
            ("seed", 5),
            ("first_example", 4),
            ("targets", 2),
            ("eot_samples", 1),
        ):
            assert torch.equal(call(**{name: kind(value)}), call(**{name: value})), (kind, name)
        assert torch.equal(
            fr.attacks.ifgsm(h.small_model(), x, y, eps=0.1, steps=kind(2)),
            fr.attacks.ifgsm(h.small_model(), x, y, eps=0.1, steps=2),
        )
    for bad in (np.float64(2), np.bool_(True), torch.tensor(True), "2", None):
        with pytest.raises(TypeError, match="steps: got"):
            call(steps=bad)
    columns = np.stack([(y + 1) % 5, (y + 2) % 5], 1)
    assert torch.equal(call(targets=columns), call(targets=torch.from_numpy(columns)))
    assert torch.equal(call(seed=2**64 - 1, restarts=2), call(seed=-1, restarts=2))  # the keys of restarts wrap around
    with pytest.raises(ValueError, match="seed: got 18446744073709551616, expected an integer of at most 64 bits"):
        call(seed=2**64)


@pytest.mark.parametrize("y", [None, torch.tensor([1])])
def test_one_image_without_its_batch(y: Tensor | None) -> None:
    x, _ = h.small_batch(1)
    with pytest.raises(ValueError, match=r"\(2, 6, 5\).* batch of 2.*x\[None\]"):
        fr.attacks.pgd(h.small_model(), x[0], y, eps=0.1)
    assert fr.attacks.pgd(h.small_model(), x[0][None], y, eps=0.1).shape == x.shape
