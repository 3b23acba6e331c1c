"""PGD, FGSM and IFGSM against plain float64 implementations and torchattacks: same starts, same steps."""

from __future__ import annotations

import copy
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _compare(model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: float, steps: int = 10) -> tuple[float, float]:
    """Robust accuracy of the package and of plain float64, from the same starts."""
    step = 2.5 * eps / steps
    start = fr.ops.random_start(x, eps, norm, seed=11)
    double = _double(model)
    plain = h.plain_pgd(double, x, y, start, eps, step, steps, norm)[-1]
    ours = fr.attacks.pgd(model, x, y, eps=eps, norm=norm, steps=steps, step_size=step, seed=11)
    return h.accuracy(model, ours, y), h.accuracy(double, plain, y)


@pytest.mark.parametrize("norm", h.NORMS)
def test_digits_robust_accuracy(norm: float) -> None:
    x, y = h.digits()  # one example is 0.06 points
    model = h.digits_model()
    clean = h.accuracy(model, x, y)
    ours, plain = _compare(model, x, y, h.RADIUS[norm], norm)
    assert abs(ours - plain) <= 0.1
    assert clean > 95 and 2 < ours < clean - 10  # the attack neither fails nor wins everywhere


@pytest.mark.parametrize("norm", h.NORMS)
def test_digits_iterates(norm: float) -> None:
    """The first iterates are those of float64 up to float32 rounding, example by example."""
    x, y = h.digits_batch(96)
    model, eps = h.digits_model(), h.RADIUS[norm]
    step = eps / 4
    start = fr.ops.random_start(x, eps, norm, seed=5)
    plain = h.plain_pgd(_double(model), x, y, start, eps, step, 3, norm)
    for k in (0, 1, 2, 3):
        ours = fr.attacks.pgd(model, x, y, eps=eps, norm=norm, steps=k, step_size=step, seed=5)
        gap = (ours.double() - plain[k]).abs().flatten(1).amax(1)
        # a coordinate whose gradient is almost zero may go another way on another machine: one example in a hundred
        assert gap.median().item() <= 5e-7 * max(k, 1)
        assert (gap > 2e-6 * k).double().mean().item() <= (0.02 if k else 0), gap.sort().values[-5:]


def _mnist_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 49, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def mnist(data_dir: pathlib.Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A model trained for a few hundred steps, and the first 2000 test images."""
    with np.load(data_dir / "mnist.npz") as data:
        images = lambda key, n: torch.tensor(data[key][:n].reshape(-1, 1, 28, 28), dtype=torch.float32) / 255
        labels = lambda key, n: torch.tensor(data[key][:n].astype(np.int64))
        x, y = images("train_images", 10000), labels("train_labels", 10000)
        x_test, y_test = images("test_images", 2000), labels("test_labels", 2000)
    torch.manual_seed(0)
    return h.train(_mnist_model(), x, y, 250, batch=64), x_test, y_test


@pytest.mark.data
@pytest.mark.parametrize(("norm", "eps"), [(h.INF, 0.06), (2, 1.0), (1, 8.0)])
def test_mnist_robust_accuracy(mnist: tuple[nn.Module, Tensor, Tensor], norm: float, eps: float) -> None:
    model, x, y = mnist  # one example is 0.05 points
    clean = h.accuracy(model, x, y)
    ours, plain = _compare(model, x, y, eps, norm)
    assert abs(ours - plain) <= 0.1
    assert clean > 88 and 5 < ours < clean - 10


@pytest.mark.parametrize("norm", h.NORMS)
def test_fgsm_is_one_step(norm: float) -> None:
    x, y = h.digits_batch(64)
    model, eps = h.digits_model(), h.RADIUS[norm]
    ours = fr.attacks.fgsm(model, x, y, eps=eps, norm=norm)
    plain = h.plain_pgd(_double(model), x, y, x, eps, eps, 1, norm)[-1]
    assert (ours.double() - plain).abs().max().item() <= 2e-6
    assert torch.equal(
        ours, fr.attacks.pgd(model, x, y, eps=eps, norm=norm, steps=1, step_size=eps, random_start=False)
    )


def test_fgsm_formula() -> None:
    """clip(x + eps sign(grad)) to the last bit, up to the rounding towards x."""
    x, y = h.digits_batch(32)
    model, eps = h.digits_model(), 0.1
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    expected = (x + eps * g.sign()).clamp(0, 1)
    ours = fr.attacks.fgsm(model, x, y, eps=eps)
    # autograd's float32 gradient vanishes where the model is certain; the fused loss keeps its sign there
    unsure = model(x).softmax(1).gather(1, y[:, None])[:, 0] < 0.999
    assert int(unsure.sum()) >= 3
    assert (ours - expected)[unsure].abs().max().item() <= 6e-8


def test_fgsm_rs_takes_a_longer_step() -> None:
    x, y = h.digits_batch(32)
    model, eps = h.digits_model(), 0.1
    ours = fr.attacks.fgsm(model, x, y, eps=eps, random_start=True, step_size=1.25 * eps, seed=3)
    start = fr.ops.random_start(x, eps, seed=3)
    plain = h.plain_pgd(_double(model), x, y, start, eps, 1.25 * eps, 1, h.INF)[-1]
    assert (ours.double() - plain).abs().max().item() <= 1e-6
    h.assert_inside(ours, x, eps, h.INF)


@pytest.mark.parametrize("norm", h.NORMS)
def test_ifgsm_steps_of_eps_over_steps(norm: float) -> None:
    x, y = h.digits_batch(48)
    model, eps = h.digits_model(), h.RADIUS[norm]
    ours = fr.attacks.ifgsm(model, x, y, eps=eps, norm=norm, steps=4)
    plain = h.plain_pgd(_double(model), x, y, x, eps, eps / 4, 4, norm)[-1]
    gap = (ours.double() - plain).abs().flatten(1).amax(1)
    assert gap.median().item() <= 2e-6 and (gap > 1e-5).double().mean().item() <= 0.1
    same = fr.attacks.pgd(model, x, y, eps=eps, norm=norm, steps=4, step_size=eps / 4, random_start=False)
    assert torch.equal(ours, same)


def test_pgd_default_step_is_madrys() -> None:
    x, y = h.digits_batch(8)
    call = lambda **more: fr.attacks.pgd(h.digits_model(), x, y, eps=0.1, steps=5, seed=0, **more)
    assert torch.equal(call(), call(step_size=0.05))
    assert not torch.equal(call(), call(step_size=0.02))


@pytest.mark.parametrize("norm", [h.INF, 2])
def test_float64_images_follow_float64_pgd(norm: float) -> None:
    """Nothing but rounding of 1e-16 is left, so every example agrees after ten steps."""
    x, y = h.digits_batch(40)
    model, eps, wide = _double(h.digits_model()), h.RADIUS[norm], x.double()
    start = fr.ops.random_start(wide, eps, norm, seed=2)
    ours = fr.attacks.pgd(model, wide, y, eps=eps, norm=norm, steps=10, step_size=eps / 4, seed=2)
    plain = h.plain_pgd(model, wide, y, start, eps, eps / 4, 10, norm)[-1]
    assert ours.dtype == torch.float64
    gap = (ours - plain).abs().flatten(1).amax(1)
    assert gap.median().item() <= 1e-6 and (gap > 1e-5).double().mean().item() <= 0.05


class _Unsure(nn.Module):
    """Flatter logits: torchattacks' float32 gradient vanishes where the model is certain, ours does not."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * h.digits_model()(x)


@pytest.mark.parametrize(("name", "norm", "eps", "bound"), [("PGD", h.INF, 0.1, 1e-6), ("PGDL2", 2, 1.0, 1e-6)])
def test_agrees_with_torchattacks(name: str, norm: float, eps: float, bound: float) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed", exc_type=ImportError)
    x, y = h.digits_batch(100)
    model, steps = _Unsure(), 5
    theirs = getattr(torchattacks, name)(model, eps=eps, alpha=eps / 4, steps=steps, random_start=False)(x, y)
    ours = fr.attacks.pgd(model, x, y, eps=eps, norm=norm, step_size=eps / 4, steps=steps, random_start=False)
    assert (ours - theirs).abs().max().item() <= bound
    assert (ours - x).abs().max().item() > 0.05
