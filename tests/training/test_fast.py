"""ATTA, ATAS, reweighting and adaptive targets against line-by-line loops, and the traps of public code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust import training
from fastrobust.training import ATAS, ATTA, AdaptiveTargets, Batch, Reweight
from fastrobust.training.registry import METHODS

EPS = 0.1
N = 12


def net(norm: bool = False) -> nn.Module:
    """Smooth, so that gradients have no kinks where rounding would decide."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)]
    if norm:
        layers.insert(1, nn.BatchNorm2d(4))
    return nn.Sequential(*layers)


def images(seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(N, 1, 6, 6, generator=g), torch.randint(0, 3, (N,), generator=g)


def batches(seed: int = 0) -> list[list[Tensor]]:
    """Orders of two epochs and more, four examples a batch."""
    g = torch.Generator().manual_seed(seed)
    return [list(torch.randperm(N, generator=g).split(4)) for _ in range(8)]


class Data(list):
    """A loader that tells its data set."""

    dataset = range(N)


def run(method: training.Method, model: nn.Module, epochs: int, lr: float = 0.2) -> list[Tensor]:
    """Train by the protocol; the examples that the loss saw."""
    x, y = images()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    seen = []
    method.begin(model, N, epochs)
    for epoch, order in zip(range(epochs), batches(), strict=False):
        method.begin_epoch(model, epoch, epochs)
        for step, index in enumerate(order):
            batch = Batch(x[index], y[index], index, epoch, epochs, step, len(order))
            adv = method.perturb(model, batch)
            seen.append(adv)
            model.train()
            update(method.loss(model, batch, adv).value)
    return seen


def crop(frame: Tensor, offset: Tensor, flip: bool, padding: int, size: int) -> Tensor:
    """Mirrored, then the window that was moved by offset."""
    frame = frame.flip(2) if flip else frame
    top, left = (padding - offset).tolist()
    return frame[:, top : top + size, left : left + size]


class LineByLine:
    """The authors' loops for one example after the other in float64, with dictionaries of padded perturbations."""

    def __init__(self, method: Any, model: nn.Module, padding: int) -> None:
        self.method, self.model, self.padding = method, model.double(), padding
        self.deltas: dict[int, Tensor] = {}
        self.v: dict[int, float] = dict.fromkeys(range(N), 0.0)
        self.targets: dict[int, Tensor] = {}

    def gradient(self, x: Tensor, y: Tensor, clean: Tensor | None, kl: bool) -> Tensor:
        self.model.eval()
        leaf = x[None].clone().requires_grad_()
        out = self.model(leaf)
        if kl:
            target = self.model(clean[None]).softmax(1).detach()
            loss = (target * (target.log() - out.log_softmax(1))).sum()
        else:
            loss = F.cross_entropy(out, y[None])
        return torch.autograd.grad(loss, leaf)[0][0]

    def example(self, i: int, x: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        m, p = self.method, self.padding
        move = m._augment.moves(torch.tensor([i]), epoch)
        offset = move.offsets[0] if move.offsets is not None else torch.zeros(2, dtype=torch.int64)
        flip = bool(move.flips[0]) if move.flips is not None else False
        image = crop(F.pad(x, (p, p, p, p)), offset, flip, p, 6)
        frame = self.deltas[i]
        project = lambda z: (image + (z - image).clamp(-m.eps, m.eps)).clamp(0, 1)
        adv = project(image + crop(frame, offset, flip, p, 6))
        if isinstance(m, ATAS):
            grad = self.gradient(adv, y, None, False)
            step = m.eps
            if epoch >= m.warm_up:
                self.v[i] = m.beta * self.v[i] + (1 - m.beta) * float((grad * m.gradient_scale).square().sum())
                root = self.v[i] ** 0.5
                step = (
                    m.step_size / (1 + root / m.c) if m.variant == "authors" else m.step_size / (self.v[i] + m.c) ** 0.5
                )
                if m.step_range is not None:
                    step = min(max(step, m.step_range[0]), m.step_range[1])
            adv = project(adv + step * grad.sign())
        else:
            for _ in range(m.steps):
                grad = self.gradient(adv, y, image, m.kind == "trades")
                adv = project(adv + m.step_size * grad.sign())
        top, left = (p - offset).tolist()
        mirrored = frame.flip(2) if flip else frame.clone()
        mirrored[:, top : top + 6, left : left + 6] = adv - image
        self.deltas[i] = mirrored.flip(2) if flip else mirrored
        return image, adv

    def value(self, images_: Tensor, adv: Tensor, y: Tensor, numbers: list[int], epoch: int) -> Tensor:
        m = self.method
        self.model.train()
        if m.name == "atta" and m.kind == "trades":
            clean, out = self.model(images_), self.model(adv)
            p, q = clean.softmax(1), out.softmax(1)
            return F.cross_entropy(clean, y) + m.beta * (p * (p.log() - q.log())).sum(1).mean()
        out = self.model(adv)
        each = []
        weights = []
        for b, i in enumerate(numbers):
            probability = out[b].softmax(0)
            target = F.one_hot(y[b], 3).double()
            if isinstance(m, AdaptiveTargets) and epoch >= m.warm_up:
                moved = m.rho * self.targets.get(i, target) + (1 - m.rho) * probability.detach()
                self.targets[i] = moved
                target = m.beta * target + (1 - m.beta) * moved
            each.append(-(target * probability.log()).sum())
            reweight = (isinstance(m, Reweight) or getattr(m, "reweight", False)) and epoch >= m.warm_up
            weights.append(float(probability[y[b]].detach()) if reweight else 1.0)
        return sum(w * e for w, e in zip(weights, each, strict=True)) / sum(weights)

    def run(self, epochs: int, lr: float = 0.2) -> list[Tensor]:
        x, y = images()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        seen = []
        for epoch, order in zip(range(epochs), batches(), strict=False):
            for index in order:
                numbers = index.tolist()
                made = [self.example(i, x[i].double(), y[i], epoch) for i in numbers]
                clean, adv = (torch.stack(part) for part in zip(*made, strict=True))
                optimizer.zero_grad()
                self.value(clean, adv, y[index], numbers, epoch).backward()
                optimizer.step()
                seen.append(adv)
        return seen


METHODS_TO_COMPARE = {
    "atta": lambda: ATTA(EPS, 0.04, shift=1, resets=()),
    "atta of two steps without moves": lambda: ATTA(EPS, 0.04, 2, shift=0, flip=False, resets=()),
    "atta trades": lambda: ATTA(EPS, 0.04, loss="trades", beta=2.0, shift=1, resets=(), init_scale=0.03),
    "atas": lambda: ATAS(EPS, warm_up=1, shift=1, resets=()),
    "atas with limits": lambda: ATAS(EPS, warm_up=0, step_range=(0.06, 0.12), gradient_scale=0.05, shift=1, resets=()),
    "atas as printed": lambda: ATAS(EPS, variant="paper", gradient_scale=1.0, warm_up=1, shift=1, resets=()),
    "reweight": lambda: Reweight(EPS, warm_up=1, shift=1),
    "adaptive targets": lambda: AdaptiveTargets(EPS, warm_up=1, shift=1),
    "adaptive targets, reweighted": lambda: AdaptiveTargets(EPS, warm_up=1, shift=1, reweight=True, rho=0.5, beta=0.3),
}


@pytest.mark.parametrize("name", METHODS_TO_COMPARE)
def test_line_by_line(name: str) -> None:
    """Three epochs: the same examples, the same store, v and targets, and the same parameters at the end."""
    method, model = METHODS_TO_COMPARE[name](), net()
    loop = LineByLine(method, copy.deepcopy(model), method.shift)
    first = training.PerturbationStore(N, (1, 6, 6), **method.store_options(), seed=method.seed)
    loop.deltas = {i: first.perturbations[i].double() for i in range(N)}
    seen, want = run(method, model, 3), loop.run(3)
    for got, expected in zip(seen, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    for i in range(N):
        torch.testing.assert_close(method.store.perturbations[i].double(), loop.deltas[i], rtol=0, atol=2e-5)
    if isinstance(method, ATAS):
        torch.testing.assert_close(
            method.v.double(), torch.tensor([loop.v[i] for i in range(N)]).double(), rtol=1e-3, atol=1e-9
        )
        assert (method.v > 0).all()
    if isinstance(method, AdaptiveTargets):
        kept = torch.stack([loop.targets[i] for i in range(N)])
        torch.testing.assert_close(method._targets.double(), kept, rtol=0, atol=1e-4)
    for p, q in zip(model.parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-4)


def test_the_attack_leaves_no_trace_and_sees_the_model_as_it_is_deployed() -> None:
    """Public code attacks in train mode, or moves batch-norm statistics by a forward for the log."""
    x, y = images()
    index = torch.arange(N)
    for method in (ATTA(EPS), ATTA(EPS, loss="trades"), ATAS(EPS), Reweight(EPS), AdaptiveTargets(EPS)):
        model = net(norm=True).train()
        before = copy.deepcopy(model.state_dict())
        method.begin(model, N, 3)
        random = torch.get_rng_state()
        adv = method.perturb(model, Batch(x, y, index))
        assert model.training and all(m.training for m in model.modules())
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.get_rng_state(), random)
        assert not adv.requires_grad and adv.min() >= 0 and adv.max() <= 1


def test_the_trades_attack_climbs_the_divergence() -> None:
    """The authors' TRADES variant attacks the cross-entropy: wrong labels must not matter to ours."""
    x, y = images()
    adv = []
    for labels in (y, (y + 1) % 3):
        method = ATTA(EPS, loss="trades", init_scale=0.03)
        method.begin(net(), N, 1)
        adv.append(method.perturb(net(), Batch(x, labels, torch.arange(N))))
    assert torch.equal(*adv)


def test_the_loss_is_a_mean_whatever_the_batch() -> None:
    """ATTA's code divides the mean by the batch size again: gradients 64 times too small."""
    x, y = images()
    method, model = ATTA(EPS), net()
    method.begin(model, N, 1)
    batch = Batch(x, y, torch.arange(N))
    adv = method.perturb(model, batch)
    value = method.loss(model, batch, adv).value
    torch.testing.assert_close(value, F.cross_entropy(model(adv), y))


def test_the_average_of_atas_does_not_depend_on_the_batch() -> None:
    x, y = images()
    index, v = torch.arange(N), []
    for size in (N, 3):
        method, model = ATAS(EPS, warm_up=0), net()
        method.begin(model, N, 1)
        for part in index.split(size):
            method.perturb(model, Batch(x[part], y[part], part))
        v.append(method.v)
    torch.testing.assert_close(*v)


@pytest.mark.parametrize("method", [Reweight(EPS, warm_up=0), AdaptiveTargets(EPS, warm_up=0, reweight=True)])
def test_weights_of_labels_that_are_out_of_the_question(method: Reweight | AdaptiveTargets) -> None:
    """A batch all of whose labels have a probability of zero in float32."""
    logits = torch.tensor([[0.0, 300.0], [0.0, 301.0]], requires_grad=True)
    batch = Batch(torch.zeros(2, 1, 6, 6), torch.tensor([0, 0]), torch.arange(2))
    method.begin(nn.Identity(), 2, 1)
    method._store = method._make_store((1, 6, 6))
    found = method.loss(lambda _: logits, batch, batch.x).value  # type: ignore[arg-type,return-value]
    share = torch.tensor([0.0, -1.0]).softmax(0)  # of e^-300 and e^-301
    kept = 1.0 if isinstance(method, Reweight) else 0.1 + 0.9 * 0.9
    assert found.item() == pytest.approx(kept * float(share[0] * 300 + share[1] * 301))
    (grad,) = torch.autograd.grad(found, logits)
    assert bool(grad.isfinite().all())


def test_resets_are_those_of_the_public_code() -> None:
    """Which counts epochs from 1: ``if epoch % 10 == 0`` (ATTA, 38 epochs), 10 and 20 (ATAS, 30 epochs)."""
    assert list(ATTA(EPS).resets) == [epoch - 1 for epoch in range(1, 38 + 1) if epoch % 10 == 0]
    assert list(ATAS(EPS).resets) == [epoch - 1 for epoch in range(1, 30 + 1) if epoch in (10, 20)]


def test_atas_warms_up_resets_and_keeps_its_average() -> None:
    x, y = images()
    method, model = ATAS(EPS, warm_up=2, resets=(3,), shift=0, flip=False), net()
    method.begin(model, N, 4)
    for epoch in range(4):
        before = None if method.v is None else method.v.clone()
        method.begin_epoch(model, epoch, 4)
        if epoch == 3:  # drawn anew, v kept
            assert not method.store.known.any() and torch.equal(method.v, before)
            assert method.store.perturbations.abs().max() <= EPS and method.store.perturbations.abs().mean() > 0.3 * EPS
        adv = method.perturb(model, Batch(x, y, torch.arange(N), epoch, 4))
        assert bool((method.v > 0).all()) == (epoch >= 2)
        if epoch < 2:  # a whole step of eps: every pixel with a gradient on a face of ball or box
            edge = ((adv - x).abs() > EPS - 1e-6) | (adv == 0) | (adv == 1) | ((adv - x).abs() < 1e-6)
            assert edge.double().mean() > 0.4


def test_the_printed_step_of_atas_is_capped_far_below_the_authors() -> None:
    """(5.16) with gamma = (16/255) C and C = .01 gives at most 1.6/255: why it is not the default."""
    printed, authors = ATAS(variant="paper"), ATAS()
    assert printed.step_size / printed.c**0.5 == pytest.approx(1.6 / 255)
    assert authors.step_size == pytest.approx(16 / 255)


@pytest.mark.parametrize("name", ["atta", "atas", "reweight", "adaptive-targets"])
def test_training_again_from_a_checkpoint_gives_the_same_bits(name: str, tmp_path) -> None:
    def steps(method: training.Method, model: nn.Module, epochs: range) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def update(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        x, y = images()
        for epoch in epochs:
            method.begin_epoch(model, epoch, 4)
            for step, index in enumerate(batches()[epoch]):
                method.step(model, Batch(x[index], y[index], index, epoch, 4, step, 3), update)

    options = {"warm_up": 1} if name != "atta" else {}
    make = lambda: METHODS[name](EPS, resets=(3,), shift=1, **options)
    whole, model = make(), net()
    whole.begin(model, N, 4)
    steps(whole, model, range(4))
    first, half = make(), net()
    first.begin(half, N, 4)
    steps(first, half, range(2))
    torch.save({"method": first.state_dict(), "model": half.state_dict()}, tmp_path / "state.pt")
    second, resumed = make(), net()
    state = torch.load(tmp_path / "state.pt")
    second.begin(resumed, N, 4)
    second.load_state_dict(state["method"])
    resumed.load_state_dict(state["model"])
    steps(second, resumed, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(whole.store.perturbations, second.store.perturbations)


@pytest.mark.parametrize("name", ["atta", "atas", "adaptive-targets"])
def test_a_killed_training_goes_on_with_the_same_bits(name: str, tmp_path) -> None:
    """Through the loop: its checkpoint holds the store, v and targets; resets and warm-up come where they belong."""
    x, y = images()
    options = {"warm_up": 1} if name != "atta" else {}

    def run_once(folder, **more: Any) -> tuple[Any, nn.Module]:
        method, model = METHODS[name](EPS, resets=(3,), shift=1, **options), net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loader = training.loader(x, y, 4)
        training.train(model, loader, method, epochs=4, optimizer=optimizer, checkpoint=folder, **more)
        return method, model

    def kill(_: nn.Module, record: dict[str, float]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    whole, model = run_once(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_once(tmp_path / "killed", callbacks=kill)
    again, resumed = run_once(tmp_path / "killed", resume=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
    assert torch.equal(whole.store.perturbations, again.store.perturbations) and again.store.resets == 1


def test_training_in_the_loop_learns_and_tells_what_is_missing() -> None:
    x, y = images()
    x = 0.3 * x + 0.3 * y.view(-1, 1, 1, 1)  # brightness is the class
    loader = Data((x[i], y[i], i) for i in torch.arange(N).split(4))
    model = net()
    records = training.train(
        model, loader, ATTA(0.02, shift=1), epochs=30, optimizer=torch.optim.Adam(model.parameters(), 0.02)
    )
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    with pytest.raises(ValueError, match="numbers"):
        training.train(net(), Data((x[i], y[i]) for i in torch.arange(N).split(4)), ATTA(), epochs=1)
    with pytest.raises(ValueError, match="loader: got one that does not tell"):
        training.train(net(), [(x, y, torch.arange(N))], ATTA(), epochs=1)
    small = training.PerturbationStore(3, (1, 6, 6))
    with pytest.raises(ValueError, match="store: got one of 3 examples"):
        training.train(net(), loader, ATTA(store=small), epochs=1)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: ATTA(-0.1), "eps: got -0.1"),
        (lambda: ATTA(loss="kl"), "loss: got 'kl'"),
        (lambda: ATTA(steps=0), "steps: got 0"),
        (lambda: ATAS(variant="thesis"), "variant: got 'thesis'"),
        (lambda: Reweight(loss="trades"), "loss: got 'trades'"),
        (lambda: AdaptiveTargets(rho=1.5), "rho: got 1.5"),
    ],
)
def test_bad_arguments(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()
