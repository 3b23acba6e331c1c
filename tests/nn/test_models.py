"""Masked layers, conversion, freezing, compacting: against the dense model with the masked weights."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import nn as fnn
from fastrobust.nn._nodes import Unit
from fastrobust.ops.binary import _conv_cost as cost
from fastrobust.ops.binary import _feature_maps as fm
from fastrobust.ops.binary._activation import RELU
from fastrobust.reference import binary as reference
from variant_runs import outputs_by_variant


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch statistics as after some training, and affine parameters that are not trivial."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 2)
            m.running_var.uniform_(1, 50)
            if m.weight is not None:
                nn.init.uniform_(m.weight, -1, 2)
                nn.init.normal_(m.bias)
    return model


class Plain(nn.Module):
    """What a user might write: odd kernels, biases, groups, dilation, dropout, a residual of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, (5, 3), (2, 1), (2, 1))
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, 1, 2, 2, groups=4)
        self.point = nn.Conv2d(12, 12, 1)
        self.shrink = nn.Conv2d(12, 6, 3, 3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn(self.first(x)))
        b = self.grouped(a)
        c = torch.relu(self.point(b) + b)
        d = self.drop(self.shrink(c).sigmoid())
        return self.fc(d.amax(dim=(2, 3)))


MODELS = {
    "small": (lambda: fnn.small_cnn(width=8), (1, 12, 12)),
    "cifar": (lambda: fnn.resnet18(width=4, affine=True), (3, 32, 32)),
    "imagenet": (lambda: fnn.resnet18(width=4, stem="imagenet", last_batch_norm=False), (3, 65, 65)),
    "plain": (Plain, (2, 19, 14)),
}


def make(name: str, rate: float = 0.8, **options) -> tuple[nn.Module, tuple[int, ...]]:
    model, size = MODELS[name]
    return with_statistics(fnn.convert(model(), rate, 0.4, **options)).eval(), size


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@pytest.fixture(params=["sparse", "auto", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTROBUST_BINARY", request.param)
    return request.param


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("init", fnn.INITIALISATIONS)
def test_layers_equal_the_dense_model_forward_and_both_gradients(name: str, init: str) -> None:
    model, size = make(name, init=init)
    dense = fnn.dense_copy(model).double()
    x = torch.rand(5, *size, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    y, want = model(x), dense(exact_x)
    assert relative(y, want) < 1e-5
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad.double())
    assert relative(x.grad, exact_x.grad) < 1e-4
    modules = dict(dense.named_modules())
    for layer_name, layer in fnn.masked_layers(model).items():
        unmasked = layer.unmasked_weight(torch.float64)
        truth = modules[layer_name].weight.grad * unmasked
        assert relative(layer.scores.grad, truth) < 1e-4
        # Pruned weights are learned too.
        assert (layer.scores.grad[~layer.mask()] != 0).any() or layer.keep == layer.scores.numel()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [0, 1, 3, 7, 16, 33])
def test_frozen_equals_the_model(name: str, batch: int, path: str) -> None:
    model, size = make(name)
    frozen = fnn.freeze(model)
    dense = fnn.dense_copy(model).double()
    x = torch.rand(batch, *size)
    with torch.no_grad():
        inference = frozen(x)
    x.requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, want = frozen(x), dense(exact_x)
    assert y.shape == want.shape and torch.equal(inference, y)
    if batch == 0:
        return
    assert relative(y, want) < 1e-5
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad.double())
    # A sum that is zero up to rounding may fall on either side of a ReLU: almost all images agree closely.
    error = (x.grad - exact_x.grad).abs().flatten(1).amax(1) / exact_x.grad.abs().flatten(1).amax(1)
    assert (error < 1e-4).double().mean() > 0.9


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics equal to those of a batch, so that activations keep their size through the layers."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.momentum = None
    with torch.no_grad():
        model.train()(x)
    return model.eval()


class Gated(torch.fx.Interpreter):
    """A model whose ReLUs pass what `gates` says, by name, and remember what came to them."""

    def __init__(self, model: nn.Module, gates: dict[str, Tensor]) -> None:
        super().__init__(torch.fx.symbolic_trace(model))
        self.gates, self.seen = gates, {}

    def run_node(self, n: torch.fx.Node) -> object:
        if n.name not in self.gates:
            return super().run_node(n)
        (x,), _ = self.fetch_args_kwargs_from_env(n)
        self.seen[n.name] = x.detach()
        return x * self.gates[n.name]


def from_bits(words: Tensor, maps: fm.Maps) -> Tensor:
    """What the sides of a ReLU, kept as one bit each, say about every pixel (see csrc/binary/args.h)."""
    count = maps.blocks * maps.channels * maps.plane // 16
    words = words.contiguous().view(torch.int16)[:count].to(torch.int32)
    run = ((words[:, None] >> torch.arange(16)) & 1).float().reshape(-1, maps.plane)
    planes = torch.zeros_like(run)
    planes[:, maps.origin :] = run[:, : maps.plane - maps.origin]
    return fm.from_maps(planes.flatten(), maps, torch.empty(maps.size))


@pytest.mark.parametrize("rate, gamma", [(0.99, 0.1), (0.7, 1.0)])
def test_the_gradient_of_a_deep_network_is_exact_between_the_kinks(rate: float, gamma: float, path: str) -> None:
    """A deep network in float32 always has sums that are zero up to rounding and fall on the other side of a ReLU than
    in float64. Where float64 is given the sides our run took, the gradients must agree to rounding; and our side may
    differ from float64's own only for such sums."""
    torch.manual_seed(0)
    x = torch.rand(6, 3, 32, 32)
    model = settled(fnn.convert(fnn.resnet34(width=8), rate, gamma), x)
    frozen = fnn.freeze(model)
    frozen(x)
    (region,) = frozen.regions.values()
    _, ((_, group, _, kept, state),) = region.forward([x], True)
    # ReLUs run in the order of the units.
    nodes = (n for n in torch.fx.symbolic_trace(fnn.dense_copy(model)).graph.nodes if "relu" in n.name)
    gates = {}
    for i, unit in enumerate(region.nodes):
        if isinstance(unit, Unit) and unit.act == RELU:
            name = next(nodes).name
            maps = group.native[i]
            if group.reads[i].dense:
                ((_, buffer),) = kept[i].items()
                gates[name] = buffer.view(state.tensors) > 0
            else:
                gates[name] = from_bits(kept[i][maps].view(state.tensors), maps) > 0
    truth = Gated(fnn.dense_copy(model).double(), gates)
    given = x.clone().requires_grad_()
    exact = x.double().requires_grad_()
    y, want = frozen(given), truth.run(exact)
    assert len(truth.seen) == len(gates) == 33 and relative(y, want) < 1e-4
    for name, before in truth.seen.items():
        wrong = (before > 0) != gates[name]
        assert not wrong.any() or before[wrong].abs().max() < 1e-3 * before.std()
        assert wrong.double().mean() < 1e-3
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad.double())
    assert float((given.grad - exact.grad).norm() / exact.grad.norm()) < 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 5, 16])
def test_what_an_earlier_run_left_in_memory_does_not_matter(name: str, batch: int, path: str) -> None:
    """Buffers of different layouts share the memory, so the zero borders of one may have been pixels of another."""
    model, size = make(name)
    frozen = fnn.freeze(model)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = frozen(x)
        return y.detach(), torch.autograd.grad(y.sum(), x)[0]

    x = torch.rand(batch, *size)
    first = both(x)
    both(torch.full_like(x, float("nan")))
    with torch.no_grad():
        frozen(torch.full_like(x, float("nan")))
        assert torch.equal(frozen(x), first[0])
    assert all(torch.equal(a, b) for a, b in zip(both(x), first, strict=True))


def test_a_frozen_model_that_has_run_can_be_copied() -> None:
    model, size = make("small")
    frozen, x = fnn.freeze(model), torch.rand(3, *size)
    want = frozen(x)
    assert torch.equal(copy.deepcopy(frozen)(x), want)


VARIANT_SCRIPT = """
import hashlib, torch, fastrobust as fr
digest = hashlib.sha256()
for batch in (1, 5, 16):
    torch.manual_seed(3)
    model = fr.nn.convert(fr.nn.resnet18(width=4, affine=True), 0.8, 0.4).eval()
    x = torch.rand(batch, 3, 20, 20, requires_grad=True)
    # Sums of torch's last layer and batch normalisation are not ours.
    frozen = fr.nn.freeze(model)
    frozen(x.detach())
    (region,) = frozen.regions.values()
    outs, saved = region.forward([x.detach()], True)
    (grad,) = region.backward([torch.randn_like(outs[0])], saved, [x.shape], [torch.contiguous_format])
    for t in (outs[0], grad):
        digest.update(t.numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_cpu_variant_gives_the_same_bits() -> None:
    """The sides of the ReLUs are kept as bits, in registers of another width on every variant."""
    results = outputs_by_variant(VARIANT_SCRIPT, FASTROBUST_BINARY="sparse")
    assert all(len(words) == 1 and len(words[0]) == 64 for words in results.values())
    assert len({words[0] for words in results.values()}) == 1, results


def test_frozen_follows_only_on_update_and_trains_nothing() -> None:
    model, size = make("small")
    frozen = fnn.freeze(model)
    x = torch.rand(4, *size)
    before = frozen(x)
    with torch.no_grad():
        for layer in fnn.masked_layers(model).values():
            layer.scores.copy_(torch.randn_like(layer.scores))
    assert torch.equal(frozen(x), before)
    frozen.update()
    after = frozen(x)
    assert not torch.equal(after, before)
    assert relative(after, fnn.dense_copy(model).double()(x.double())) < 1e-5
    assert not list(frozen.parameters())
    z = x.clone().requires_grad_()
    frozen(z).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_frozen_gradient_twice_and_pgd() -> None:
    model, size = make("cifar")
    frozen = fnn.freeze(model)
    x = torch.rand(3, *size, requires_grad=True)
    y = frozen(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    labels = torch.tensor([0, 1, 2])
    options = {"eps": 0.05, "steps": 3, "step_size": 0.02, "seed": 3}
    ours = fr.attacks.pgd(frozen, x.detach(), labels, **options)
    theirs = fr.attacks.pgd(fnn.dense_copy(model), x.detach(), labels, **options)
    assert (ours - theirs).abs().mean() < 1e-3


def test_paths_reports_every_layer(path: str) -> None:
    model, size = make("cifar")
    rows = fnn.freeze(model).paths((4, *size))
    assert sorted(r["layer"] for r in rows) == sorted(fnn.masked_layers(model))
    if path != "auto":
        assert {r["path"] for r in rows} == {path}
    assert all("us sparse" in r["reason"] for r in rows)


def test_runs_do_not_disturb_each_other(path: str) -> None:
    """Memory is used again between calls: of other batch sizes, while a gradient is still wanted, and after a NaN."""
    model, size = make("cifar", rate=0.9)
    frozen = fnn.freeze(model)
    x = torch.rand(16, *size)
    xs = [x[:n].clone().requires_grad_() for n in (16, 3, 16)]
    ys = [frozen(z) for z in xs]
    with torch.no_grad():
        assert frozen(x * float("nan")).isnan().any()
        clean = frozen(x)
    assert torch.equal(ys[0], clean) and torch.equal(ys[2], clean)
    grads = [torch.autograd.grad(y.square().sum(), z)[0] for z, y in zip(xs, ys, strict=True)]
    assert torch.equal(grads[0], grads[2])
    again = frozen(xs[1])
    assert torch.equal(torch.autograd.grad(again.square().sum(), xs[1])[0], grads[1])
    last = frozen(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last, clean)


def test_networks_mix_both_paths_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and sparse layers side by side, residuals between them, in every combination."""
    monkeypatch.delenv("FASTROBUST_BINARY", raising=False)
    model, size = make("cifar", rate=0.8)
    want = fnn.dense_copy(model).double()
    x = torch.rand(13, *size)  # enough for an arena of several huge pages
    exact = x.double().requires_grad_()
    truth = want(exact)
    grad = torch.randn(truth.shape)
    truth.backward(grad.double())
    for seed in range(6):
        frozen = fnn.freeze(model)
        generator = torch.Generator().manual_seed(seed)
        estimate = cost.estimate

        def either(*args: object, estimate=estimate, generator=generator) -> cost.Choice:
            dense = bool(torch.rand((), generator=generator) < 0.5)
            return dataclasses.replace(estimate(*args), sparse=float(dense) * 1e9, dense=float(not dense) * 1e9)

        monkeypatch.setattr(cost, "estimate", either)
        given = x.clone().requires_grad_()
        y = frozen(given)
        monkeypatch.setattr(cost, "estimate", estimate)
        (region,) = frozen.regions.values()
        assert {r.choice.path for r in region.latest.reads} == {"sparse", "dense"}
        assert relative(y, truth) < 1e-5
        y.backward(grad)
        error = (given.grad - exact.grad).flatten(1).norm(dim=1) / exact.grad.flatten(1).norm(dim=1)
        assert error.median() < 1e-4


def test_freeze_refuses_what_no_record_stands_for() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="model: forward branches on values of its input"):
        fnn.freeze(Branching())(torch.rand(2, 3))
    model, size = make("small")
    with pytest.raises(ValueError, match=r"x: expected .*got \(2, 3, 12, 12\)"):
        fnn.freeze(model)(torch.rand(2, 3, 12, 12))


def test_the_mask_is_cached_on_the_version_of_the_scores() -> None:
    layer = fnn.BinaryMaskedConv2d(4, 8, 3, keep=50)
    packed = layer.packed()
    assert layer.packed() is packed and packed.kept == 50
    with torch.no_grad():
        layer.scores.neg_()
    assert layer.packed() is not packed
    layer.keep = 20
    assert layer.packed().kept == 20
    assert torch.equal(layer.mask(), reference.topk_mask(layer.scores, 20))


def test_absolute_ranks_by_magnitude() -> None:
    layer = fnn.BinaryMaskedLinear(10, 3, keep=7, absolute=True)
    assert torch.equal(layer.mask(), reference.topk_mask(layer.scores.abs(), 7))
    x = torch.randn(4, 10)
    layer(x).sum().backward()
    plain = copy.deepcopy(layer)
    plain.absolute, plain.scores.grad = False, None
    plain.set_mask(layer.mask())
    plain(x).sum().backward()
    assert torch.allclose(layer.scores.grad, plain.scores.grad * layer.scores.sign())


def test_initialisations() -> None:
    binary = fnn.BinaryMaskedConv2d(16, 32, 3, keep=100, score_range=0.1)
    assert set(binary.signs.unique().tolist()) == {-1, 1} and float(binary.magnitude) == 1
    assert 0.09 < float(binary.scores.abs().max()) <= 0.1
    constant = fnn.BinaryMaskedConv2d(16, 32, 3, keep=100, init="signed_constant")
    fan_in, fraction = 16 * 9, 100 / (32 * 16 * 9)
    assert float(constant.magnitude) == pytest.approx((2 / (fan_in * fraction)) ** 0.5)
    assert float(constant.scores.abs().max()) <= fan_in**-0.5
    with pytest.raises(ValueError, match="init: expected one of"):
        fnn.BinaryMaskedConv2d(1, 1, 1, init="normal")


def test_convert_keeps_what_it_is_told() -> None:
    net = fnn.resnet18(width=4)
    model = fnn.convert(net, 0.9, 0.3, first_dense=True, last_dense=True)
    assert type(model.conv1) is nn.Conv2d and type(model.fc) is nn.Linear and type(net.layer1[0].conv1) is nn.Conv2d
    layers = fnn.masked_layers(model)
    total = sum(layer.scores.numel() for layer in layers.values())
    assert sum(layer.keep for layer in layers.values()) == total // 10
    for name, layer in layers.items():
        assert torch.equal(layer.signs.float(), net.get_submodule(name).weight.sign())
    with pytest.raises(ValueError, match="model: expected at least one"):
        fnn.convert(nn.ReLU(), 0.9, 0.3)


def test_state_dict_round_trip_and_dense_export() -> None:
    model, size = make("plain")
    other = fnn.convert(Plain(), 0.5, 1.0)
    other.load_state_dict(model.state_dict())
    x = torch.rand(3, *size)
    assert torch.equal(other.eval()(x), model(x))
    dense = Plain().eval()
    dense.load_state_dict(fnn.dense_state_dict(model))
    assert relative(dense(x), model(x).double()) < 1e-5


def test_update_masks_does_all_stale_layers() -> None:
    model, _ = make("cifar")
    fnn.update_masks(model)
    layers = fnn.masked_layers(model)
    assert not any(layer.stale() for layer in layers.values())
    first = next(iter(layers.values()))
    with torch.no_grad():
        first.scores.mul_(-1)
    assert first.stale()
    fnn.update_masks(model)
    assert torch.equal(first.packed().to_dense() != 0, first.mask())


def test_compact_is_the_same_function_and_smaller() -> None:
    model, size = make("cifar", rate=0.97)
    small = fnn.compact(model)
    x = torch.rand(6, *size)
    assert relative(small(x), fnn.dense_copy(model).double()(x.double())) < 1e-5
    before = sum(layer.scores.numel() for layer in fnn.masked_layers(model).values())
    after = sum(layer.scores.numel() for layer in fnn.masked_layers(small).values())
    assert after < before
    assert fnn.compact(small).state_dict().keys() == small.state_dict().keys()
    again = sum(layer.scores.numel() for layer in fnn.masked_layers(fnn.compact(small)).values())
    assert again == after
    assert relative(fnn.freeze(small)(x), model(x).double()) < 1e-5


def test_compact_keeps_a_dead_row_that_is_not_zero() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1)
    )
    model = fnn.convert(net, 0.0, 1.0).eval()
    model[0].signs[1:] = 0  # rows 1 and 2 are empty
    model[1].running_mean.copy_(torch.tensor([0.0, -1.0, 1.0]))  # they become +1 and -1, and ReLU drops the latter
    model[0].refresh()
    small = fnn.compact(model)
    assert small[0].out_channels == 2 and small[3].in_channels == 2
    x = torch.rand(2, 1, 6, 6)
    assert relative(small(x), model(x).double()) < 1e-6
    model[3].signs[:, 1] = 0  # now nobody reads row 1
    model[3].refresh()
    assert fnn.compact(model)[0].out_channels == 1


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match="keep: expected 0 to 36, the weights of the layer, got 37"):
        fnn.BinaryMaskedConv2d(1, 4, 3, keep=37)
    with pytest.raises(TypeError, match="keep: expected an int"):
        fnn.BinaryMaskedLinear(2, 2, keep=1.0)
    with pytest.raises(ValueError, match="groups: expected a divisor"):
        fnn.BinaryMaskedConv2d(3, 4, 3, groups=2)
    layer = fnn.BinaryMaskedLinear(2, 3)
    with pytest.raises(ValueError, match=r"x: expected \(..., 2\), got \(4, 3\)"):
        layer(torch.zeros(4, 3))
    with torch.no_grad():
        layer.scores[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores: expected finite"):
        layer(torch.zeros(4, 2))
    assert os.environ.get("FASTROBUST_BINARY") is None
