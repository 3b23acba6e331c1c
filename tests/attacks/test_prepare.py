"""Prepared victims: what the model says and its gradients, whatever the network; never stale; verdicts are the model's."""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import prepare
from fastrobust.benchmarks import models_of_others

module = importlib.import_module("fastrobust.attacks.prepare")
LAST, FIRST = torch.channels_last, torch.contiguous_format
WAYS = [("written", FIRST), ("written", LAST), ("folded", FIRST), ("folded", LAST), ("fused", LAST)]


@pytest.fixture(autouse=True)
def _taken_whatever_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest way is run even where the model is faster: what is computed is tested here."""
    monkeypatch.setattr(module, "PAYS", 0.0)
    monkeypatch.setattr("fastrobust.attacks._compared._ROUNDS", (1, 1))


def settled(model: nn.Module) -> nn.Module:
    """Random statistics and factors, as of a trained network; parameters ask for gradients."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_mean is not None and m.running_var is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 2)
                nn.init.normal_(m.bias)
    return model.eval()


def outputs_and_gradient(model: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaf)[0]


def apart(got: Callable[[Tensor], Any], want: Callable[[Tensor], Any], x: Tensor) -> float:
    """The larger of the relative differences of outputs and of input gradients."""
    pairs = zip(outputs_and_gradient(got, x), outputs_and_gradient(want, x), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


# ---- networks ----


class Shared(nn.Module):
    """One convolution, called twice, with two normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.l = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(self.c(x)))
        return self.l(F.relu(self.b(self.c(x))).view(x.size(0), -1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.p = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.n, self.q, self.l = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x).relu()
        for _ in range(2):
            y = self.n(self.a(x))
            y += self.q(self.p(x))
            x = F.relu(y + x)
        return self.l(x.mean((2, 3)))


class Dense(nn.Module):
    """Normalisation before convolutions, padded and not, and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.c, self.m = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(8)
        self.d, self.l = nn.Conv2d(8, 4, 1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.c(F.relu(self.n(x)))], 1)
        return self.l(self.d(F.relu(self.m(y))).reshape(-1, 256))


class InPlace(nn.Module):
    """What is added is read after it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.r = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.d, self.l = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.c(x))
        z = self.r(y)
        return self.l((self.d(z) + y).flatten(1))


class WrittenThroughView(nn.Module):
    """In another layout the view would be a copy, and its ReLU lost."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.l = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y.view(y.size(0), -1).relu_()
        return self.l(y.flatten(1))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.std = torch.rand(3, 1, 1) + 0.5  # no buffer
        self.model = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)


class Branching(nn.Module):
    """torch.fx does not read it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.l = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.c(x))
        if x.mean() > 0:
            x = 2 * x
        return self.l(x.relu().flatten(1))


class Lines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.m, self.l = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.BatchNorm1d(248), nn.Linear(248, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.m(self.n(self.c(x.flatten(2))).relu().flatten(1)))


def head(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 5))


def conv(*args: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **options)


# name: (network, normalisations that fold)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (lambda: head(conv(3, 8, 3), nn.ReLU(), features=288), 0),
    "normalisation before padding": (lambda: head(nn.BatchNorm2d(3), conv(3, 8, 3, padding=1), nn.ReLU(), features=512), 0),
    "normalisation before groups": (lambda: head(nn.BatchNorm2d(3), conv(3, 6, 3, groups=3), nn.ReLU6(), features=216), 1),
    "depthwise": (
        lambda: head(
            conv(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6(True), conv(12, 12, 3, 2, 1, groups=12),
            nn.BatchNorm2d(12), nn.Hardtanh(-1, 2), conv(12, 8, 1), features=32,
        ), 2),
    "grouped, dilated": (
        lambda: head(
            conv(3, 8, 3, dilation=2, padding=2), conv(8, 12, 3, groups=4, padding=1), nn.BatchNorm2d(12), nn.SiLU(),
            features=768,
        ), 1),
    "transposed": (
        lambda: head(
            conv(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.BatchNorm2d(6), nn.LeakyReLU(0.1, True),
            features=384,
        ), 1),
    "without affine": (
        lambda: head(conv(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Dropout(), features=288), 1),
    "statistics of the batch": (
        lambda: head(conv(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), features=288), 0),
    "other paddings": (
        lambda: head(
            conv(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            conv(8, 4, 3, padding="same"), features=64,
        ), 1),
    "weight norm": (
        lambda: head(
            nn.utils.parametrizations.weight_norm(conv(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), features=288), 0),
    "shared layer": (Shared, 2), "residual": (Residual, 4), "dense": (Dense, 0), "in place": (InPlace, 1),
    "written through a view": (WrittenThroughView, 0), "normalised inside": (Normalised, 4), "one dimension": (Lines, 2),
    "branching": (Branching, 0),
}  # fmt: skip


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return settled(NETWORKS[name][0]())


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_of_every_way(name: str) -> None:
    """Whatever batch comes, not only one of the example's size; in float64 too."""
    model, x = network(name), torch.rand(6, 3, 8, 8)
    victim = prepare(model, x)
    report = victim.report
    assert report.prepared and len(report.folded) == NETWORKS[name][1], report
    if name == "branching":
        assert "torch.fx cannot read it" in report.why
    for batch in (1, 4, 9):
        assert apart(victim, model, torch.rand(batch, 3, 8, 8)) < 1e-4
    if name not in ("shared layer", "written through a view"):  # whose views do not take the layout
        assert apart(victim, model, x.contiguous(memory_format=LAST)) < 1e-4
    exactly = 0
    double, wide = copy.deepcopy(model).double(), torch.rand(3, 3, 8, 8).double()
    if isinstance(double, Normalised):
        double.std = double.std.double()
    for level, layout in WAYS:
        recipe = module._Recipe(level, layout)
        if recipe.title in report.ratios:
            run, _ = module._made(model, x, recipe)
            assert apart(run, model, torch.rand(5, 3, 8, 8)) < 1e-4, recipe.title
            assert apart(module._made(double, wide, recipe)[0], double, wide) < 1e-12, recipe.title
            exactly += 1
    assert exactly >= (1 if name == "written through a view" else 2)


@pytest.mark.parametrize("name", models_of_others.NETWORKS)
def test_networks_of_others(name: str) -> None:
    of = models_of_others.NETWORKS[name]
    torch.manual_seed(2)
    model, x = models_of_others.settle(of.make(**of.small), of.small_shape), torch.rand(5, *of.small_shape)
    victim = prepare(model, x)
    assert victim.report.prepared and not victim.report.dropped, victim.report
    assert apart(victim, model, torch.rand(7, *of.small_shape)) < 1e-3


@st.composite
def random_networks(draw: Any) -> tuple[nn.Module, Tensor]:
    """A few layers with normalisation before, behind or nowhere, activations, and sums over them."""

    class Block(nn.Module):
        def __init__(self, layers: nn.Sequential, adds: bool, act: nn.Module) -> None:
            super().__init__()
            self.layers, self.adds, self.act = layers, adds, act

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers(x)
            out: Tensor = self.act(y + x if self.adds else y)
            return out

    torch.manual_seed(draw(st.integers(0, 2**31)))
    blocks: list[nn.Module] = []
    channels = 4
    for _ in range(draw(st.integers(1, 4))):
        kernel, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 4]))
        out = draw(st.sampled_from([4, 8]))
        stride, padding, bias = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.booleans())
        layer: nn.Module = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=bias)
        same = out == channels and stride == 1 and kernel == 2 * padding + 1
        before, behind, inplace = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        parts = [nn.BatchNorm2d(channels)] * before + [layer] + [nn.BatchNorm2d(out)] * behind
        act = draw(
            st.sampled_from([nn.ReLU(inplace), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5, inplace), nn.ELU(), nn.Identity()])
        )
        block = Block(nn.Sequential(*parts), same and draw(st.booleans()), act)
        blocks.append(block)
        channels = out
    model = settled(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)))
    return model, torch.rand(draw(st.integers(1, 5)), 4, 9, 7)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_networks(), st.integers(1, 6))
def test_random_networks(drawn: tuple[nn.Module, Tensor], batch: int) -> None:
    model, x = drawn
    victim = prepare(model, x)
    assert victim.report.prepared, victim.report
    assert apart(victim, model, torch.rand(batch, 4, 9, 7)) < 1e-3


def test_masked_layers_are_frozen() -> None:
    model, shape = models_of_others.masked("ResNet-18", "ReLU", 0.9, 0.1, small=True)
    x = torch.rand(4, *shape)
    victim = prepare(model, x)
    assert any(title.startswith("frozen") for title in victim.report.ratios)
    assert apart(victim, model, x) < 1e-4
    assert "frozen already" in prepare(fr.nn.freeze(model), x).report.why


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = network("residual").to(dtype), torch.rand(4, 3, 8, 8).to(dtype)
    victim = prepare(model, x)
    assert victim.report.prepared, victim.report
    assert victim(x).dtype == dtype
    got, want = outputs_and_gradient(victim, x), outputs_and_gradient(model, x)
    room = 16 * torch.finfo(dtype).eps
    assert float((got[0] - want[0]).double().norm()) <= room * float(want[0].double().norm())


# ---- where the model itself is run ----


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.l((x + 0.1 * torch.randn_like(x)).flatten(1))


class Gateless(Residual):
    """A part has no gradient, which a graph of the other values does not show."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x)
        with torch.no_grad():
            gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        return self.l((y * gate).relu().mean((2, 3)))


class Counting(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x)


def hooked() -> nn.Module:
    model = Residual()
    model.i.register_forward_hook(lambda m, given, out: 2 * out)
    return model


FALLBACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "noise": (Noisy, "gives other outputs for the same images"),
    "no gradient": (Gateless, "differs by"),
    "counter in a buffer": (Counting, "writes its own parameters or buffers"),
    "hook": (hooked, "hooks"),
    "function": (lambda: torch.nn.Flatten().forward, "not an nn.Module"),
    "fails": (lambda: head(features=7), "fails on the example"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_model_itself_with_one_line(name: str) -> None:
    make, why = FALLBACKS[name]
    model, x = make(), torch.rand(4, 3, 8, 8)
    model = model.eval() if isinstance(model, nn.Module) else model
    victim = prepare(model, x)
    text = str(victim.report)
    assert not victim.report.prepared and why in text and "\n" not in text
    assert victim.report.ratio == 1.0
    if name not in ("noise", "fails"):
        assert torch.equal(victim(x), model(x))


def test_what_does_not_pay_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAYS", 1e9)
    model, x = network("residual"), torch.rand(4, 3, 8, 8)
    victim = prepare(model, x)
    assert victim.report.why.startswith("it does not pay") and torch.equal(victim(x), model(x))


def test_other_images_go_to_the_model() -> None:
    model, x = network("residual"), torch.rand(4, 3, 8, 8)
    victim = prepare(model, x)
    calls: list[Any] = []
    victim.built.run = calls.append
    for other in (torch.rand(2, 3, 10, 8), x[:0]):
        assert torch.equal(victim(other), model(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(victim(x), model(x))
    assert not calls
    victim(x)
    assert len(calls) == 1


def test_bad_input() -> None:
    model = network("plain")
    for given_model, example, error, text in (
        (3, torch.rand(2, 3, 8, 8), TypeError, "model: got"),
        (nn.ReLU, torch.rand(2, 3, 8, 8), TypeError, "model: got"),
        (model, [1.0], TypeError, "example: got"),
        (model, torch.ones(2, 3, 8, 8).long(), TypeError, "example: got"),
        (model, torch.rand(0, 3, 8, 8), ValueError, "example: got"),
        (model, torch.rand(3), ValueError, "example: got"),
    ):
        with pytest.raises(error, match=text):
            prepare(given_model, example)  # type: ignore[arg-type]


# ---- the original ----


@pytest.mark.parametrize("name", ["residual", "branching", "weight norm", "in place"])
def test_original_is_untouched(name: str) -> None:
    model, x = network(name).train(), torch.rand(4, 3, 8, 8)
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    state = torch.get_rng_state()
    want = copy.deepcopy(model).eval()(x)
    victim = prepare(model, x)
    victim(x).sum().backward() if victim(x).requires_grad else None
    fr.attacks.pgd(victim, x, torch.zeros(4).long(), eps=0.1, steps=2, check=False, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert kinds == [type(m) for m in model.modules()] and modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model.eval()(x), want)
    model(x).sum().backward()  # a parametrised layer still makes its weight
    assert all(p.grad is not None for p in model.parameters())


def _no_grad_write(model: Any) -> None:
    with torch.no_grad():
        model.i.weight.mul_(1.5)


def _training_step(model: Any) -> None:
    model.train()
    F.cross_entropy(model(torch.rand(8, 3, 8, 8)), torch.arange(8) % 5).backward()
    torch.optim.SGD(model.parameters(), 0.5).step()
    model.eval()


def _load(model: Any) -> None:
    model.load_state_dict({k: 1.5 * v if v.is_floating_point() else v for k, v in model.state_dict().items()})


def _new_parameter(model: Any) -> None:
    model.l.weight = nn.Parameter(2 * model.l.weight.detach())


@pytest.mark.parametrize("change", [_no_grad_write, _training_step, _load, _new_parameter])
def test_changed_weights_are_seen_in_the_next_pass(change: Callable[[Any], None]) -> None:
    model, x = network("residual"), torch.rand(4, 3, 8, 8)
    victim, before = prepare(model, x), network("residual")(x)
    change(model)
    assert not torch.allclose(model(x), before, atol=1e-2)
    assert apart(victim, model, x) < 1e-4
    assert victim.report.prepared and victim.generation == 1
    assert not victim.refresh()


def _past_the_counters(model: Any) -> None:
    model.model.l.bias.data.add_(1.0)


def _numpy(model: Any) -> None:
    model.model.l.weight.detach().numpy()[:, 0] += 1.0


def _exchanged(model: Any) -> None:
    w = model.model.l.weight.detach().numpy()
    w[0, 0], w[0, 1] = w[0, 1].copy(), w[0, 0].copy()


def _attribute(model: Any) -> None:
    model.std.numpy()[...] *= 2


def _new_attribute(model: Any) -> None:
    model.std = 2 * model.std


def _new_layer(model: Any) -> None:
    model.model.l = nn.Linear(8, 5)


def _new_number(model: Any) -> None:
    model.model.n.eps = 1.0


def _new_hook(model: Any) -> None:
    model.model.i.register_forward_hook(lambda m, given, out: 2 * out)


@pytest.mark.parametrize(
    "change",
    [_past_the_counters, _numpy, _exchanged, _attribute, _new_attribute, _new_layer, _new_number, _new_hook],
)
def test_other_changes_are_seen_at_the_start_of_an_attack(change: Callable[[Any], None]) -> None:
    model, x, y = network("normalised inside"), torch.rand(4, 3, 8, 8), torch.zeros(4).long()
    victim = prepare(model, x)
    before = model(x)
    change(model)
    assert not torch.equal(model(x), before)
    fr.attacks.pgd(victim, x, y, eps=0.1, steps=1, check=False, seed=0)
    assert apart(victim, model, x) < 1e-4
    assert victim.report.prepared == (change is not _new_hook)


def test_counters_of_the_model_are_no_change() -> None:
    class Calls(Residual):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x.detach()
            return super().forward(x)

    model, x = settled(Calls()), torch.rand(4, 3, 8, 8)
    model.calls = 0
    model.last = x
    victim = prepare(model, x)
    model(x)
    assert victim.report.prepared and not victim.refresh()


def test_copies_and_pickles() -> None:
    model, x = network("plain"), torch.rand(4, 3, 8, 8)
    victim = prepare(model, x)
    for other in (copy.deepcopy(victim), pickle.loads(pickle.dumps(victim))):
        assert other.source is not model and apart(other, model, x) < 1e-4
        with torch.no_grad():
            next(other.source.parameters()).mul_(2)
        assert apart(other, other.source, x) < 1e-4 and apart(victim, model, x) < 1e-4


# ---- attacks ----


ATTACKS: dict[str, Callable[..., Any]] = {
    "pgd": lambda *a, **o: fr.attacks.pgd(*a, eps=0.1, steps=5, **o),
    "pgd, best": lambda *a, **o: fr.attacks.pgd(*a, eps=0.1, steps=5, keep="best", restarts=2, **o),
    "pgd, targets": lambda *a, **o: fr.attacks.pgd(*a, eps=0.1, steps=3, targets="all", **o),
    "pgd, norm 2": lambda *a, **o: fr.attacks.pgd(*a, eps=0.5, norm=2, steps=5, normalize=([0.5], [0.3]), **o),
    "apgd": lambda *a, **o: fr.attacks.apgd(*a, eps=0.1, steps=8, **o),
    "fab": lambda *a, **o: fr.attacks.fab(*a, eps=0.1, steps=5, **o),
    "fab, targets": lambda *a, **o: fr.attacks.fab(*a, eps=0.1, steps=5, targets=2, **o),
    "square": lambda *a, **o: fr.attacks.square(*a, eps=0.1, queries=40, **o),
    "autoattack": lambda *a, **o: fr.attacks.autoattack(
        *a, eps=0.05, version=[("apgd-ce", {"steps": 6}), ("fab-t", {"steps": 3, "targets": 2})], batch_size=12, **o
    ),
}  # fmt: skip


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with normalisations, trained for some steps on the embedded digits."""
    found = fr.data.load("digits", "train")
    x, y = found.images[:256], found.labels[:256]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval(), x[:24], y[:24]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    return digits()


@pytest.mark.parametrize("name", ATTACKS)
def test_same_verdicts_which_are_the_models(name: str, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    attack, details = ATTACKS[name], {"seed": 3, "return_details": True, "check": False}
    plain, found = attack(model, x, y, **details), attack(model, x, y, prepare=True, **details)
    victim = module.prepared_once(model, x)
    assert victim.report.prepared, victim.report
    assert torch.equal(plain.fooled, found.fooled)
    assert bool(found.fooled.any())
    scaled = (found.adv - 0.5) / 0.3 if "norm 2" in name else found.adv
    with torch.no_grad():
        assert torch.equal(model(scaled).argmax(1) != y, found.fooled)
    assert torch.equal(attack(model, x, y, prepare=True, **details | {"return_details": False}), found.adv)


def test_the_search_runs_on_what_was_prepared(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """A victim that is wrong everywhere finds nothing true; what is said to be fooled is still the model's word."""
    model, x, y = trained
    y = model(x).argmax(1)
    bad = copy.deepcopy(model)
    bad[-1].bias.data[:] = torch.linspace(0, 1e4, 10)  # always the last class
    real, calls = module.prepared_once(model, x), []

    def wrong(given: Any, images: Tensor) -> Any:
        calls.append(len(images))
        real.built.run = bad
        return real

    monkeypatch.setattr("fastrobust.attacks._model.prepared_once", wrong)
    was = real.built.run
    try:
        for name, attack in ATTACKS.items():
            calls.clear()
            found = attack(model, x, y, seed=3, return_details=True, check=False, prepare=True)
            scaled = (found.adv - 0.5) / 0.3 if "norm 2" in name else found.adv
            with torch.no_grad():
                assert torch.equal(model(scaled).argmax(1) != y, found.fooled), name
            assert calls, name
            if name.startswith("fab"):
                assert torch.equal(found.adv[~found.fooled], x[~found.fooled])
    finally:
        real.built.run = was


def test_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = digits()
    made: list[Any] = []
    monkeypatch.setattr(module, "_build", lambda *a, build=module._build: made.append(a) or build(*a))
    for _ in range(3):
        fr.attacks.pgd(model, x, y, eps=0.1, steps=1, prepare=True, check=False)
    assert len(made) == 1
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    fr.attacks.pgd(model, x, y, eps=0.1, steps=1, prepare=True, check=False)
    assert len(made) == 1 and apart(module.prepared_once(model, x), model, x) < 1e-4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"autocast": torch.bfloat16}, "autocast"),
        ({"model_mode": "keep"}, "training mode"),
        ({"model": "function"}, "not an nn.Module"),
    ],
)
def test_attacks_say_why_nothing_is_prepared(options: dict[str, Any], why: str) -> None:
    model, x, y = digits()
    model.train("model_mode" in options)
    given_model: Any = (lambda t: model(t)) if options.pop("model", None) else model
    with pytest.warns(UserWarning, match=f"prepare: the model itself is attacked: .*{why}") as seen:
        fr.attacks.pgd(given_model, x, y, eps=0.1, steps=1, prepare=True, check=False, **options)
    assert len(seen) == 1 and "\n" not in str(seen[0].message)


def test_frozen_models_and_other_lists_need_no_word() -> None:
    model, shape = models_of_others.masked("ResNet-18", "ReLU", 0.9, 0.1, small=True)
    x = torch.rand(3, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.attacks.pgd(fr.nn.freeze(model), x, torch.zeros(3).long(), eps=0.1, steps=1, prepare=True, check=False)
        assert fr.attacks.pgd(model, x[:0], torch.zeros(0).long(), eps=0.1, steps=1, prepare=True).shape == x[:0].shape


def test_prepare_is_a_bool() -> None:
    x, y = h.small_batch(4)
    for attack in (fr.attacks.pgd, fr.attacks.apgd, fr.attacks.square, fr.attacks.autoattack):
        with pytest.raises(TypeError, match="prepare: got .*expected a bool"):
            attack(h.small_model(), x, y, eps=0.1, prepare=1)  # type: ignore[operator]
