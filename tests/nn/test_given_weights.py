"""Masked layers whose fixed weights are any numbers: magnitude-pruned networks, and hidden networks of other code."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import fastrobust as fr
from fastrobust import nn as fnn
from fastrobust import training


class TopShare(torch.autograd.Function):
    """The mask as hidden networks make it: all but the int((1 - k) n) lowest scores, straight through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: float) -> Tensor:
        out, order = scores.clone(), scores.flatten().argsort()
        dropped = int((1 - k) * scores.numel())
        out.view(-1)[order[:dropped]], out.view(-1)[order[dropped:]] = 0, 1
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Popup(nn.Conv2d):
    """A layer of a hidden network: fixed weights of kaiming_normal, learned scores."""

    share = 0.3

    def __init__(self, *args: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scores = nn.Parameter(torch.empty_like(self.weight))
        nn.init.kaiming_uniform_(self.scores, a=math.sqrt(5))
        nn.init.kaiming_normal_(self.weight)
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        subnet = TopShare.apply(self.scores.abs(), self.share)
        return F.conv2d(x, self.weight * subnet, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Block(nn.Module):
    def __init__(self, width: int, conv: type[nn.Conv2d] = Popup) -> None:
        super().__init__()
        self.conv1 = conv(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width, affine=False)
        self.conv2 = conv(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


class Hidden(nn.Module):
    """A small residual network; the last layer is a convolution of one pixel, as in the code of others."""

    def __init__(self, conv: type[nn.Conv2d] = Popup) -> None:
        super().__init__()
        self.first = conv(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(Block(8, conv), nn.MaxPool2d(2), Block(8, conv))
        self.last = conv(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.adaptive_avg_pool2d(self.blocks(F.relu(self.first(x))), 1)).flatten(1)


def settled(model: nn.Module) -> nn.Module:
    """With statistics of its own, in eval mode."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 12, 12))
    return model.eval()


def near(ours: Tensor, exact: Tensor) -> None:
    scale = float(exact.detach().abs().max())
    assert float((ours.detach().double() - exact.detach().double()).abs().max()) <= 2e-5 * scale


def passes(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    out = model(x)
    return out, torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out)).sum(), x)[0]


# ---- networks of other code ----


@pytest.mark.parametrize("path", ["auto", "sparse", "dense"])
def test_a_hidden_network_by_its_state_dict(path: str, monkeypatch, tmp_path) -> None:
    """Their model, their state_dict, convert: the same function, gradient of the input and of the scores."""
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    torch.manual_seed(3)
    torch.save(settled(Hidden()).state_dict(), tmp_path / "theirs")
    theirs = Hidden().eval()
    theirs.load_state_dict(torch.load(tmp_path / "theirs", weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fnn.convert(theirs, 0.7, 1.0, init="given", method="layerwise", own_forward=True)
    layers = fnn.masked_layers(ours)
    assert len(layers) == 6 and all(layer.absolute for layer in layers.values())
    for name, layer in layers.items():
        their = theirs.get_submodule(name)
        assert layer.keep == their.scores.numel() - int((1 - 0.3) * their.scores.numel())
        assert torch.equal(layer.scores, their.scores) and torch.equal(layer.signs, their.weight)
        assert layer.scores.requires_grad  # whatever their weight does
    x = torch.rand(7, 3, 12, 12)
    exact, exact_grad = passes(copy.deepcopy(theirs).double(), x.double())
    for model in (ours, fnn.freeze(ours)):
        out, grad = passes(model, x)
        near(out, exact)
        near(grad, exact_grad)
    F.cross_entropy(theirs(x), torch.arange(7) % 5).backward()
    F.cross_entropy(ours(x), torch.arange(7) % 5).backward()
    for name, layer in layers.items():
        near(layer.scores.grad, theirs.get_submodule(name).scores.grad)


def test_layers_with_a_forward_of_their_own_are_taken_on_request_only() -> None:
    net = nn.Sequential(Popup(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.warns(UserWarning, match=r"left as they are: 0 \(Popup has a forward of its own\)"):
        plain = fnn.convert(net, 0.5, 1.0)
    assert type(plain[0]) is Popup
    with pytest.warns(UserWarning, match="the forwards that 0 had compute something else"):  # another number is kept
        both = fnn.convert(net, 0.5, 1.0, init="given", own_forward=lambda layer: isinstance(layer, Popup))
    assert all(isinstance(layer, fnn.BinaryMaskedConv2d) for layer in both)
    assert both[0].absolute and not both[1].absolute
    assert torch.equal(both[1].scores, net[1].weight.abs())
    with pytest.warns(UserWarning, match="Popup has a forward"):
        assert type(fnn.convert(net, 0.5, 1.0, init="given", own_forward=lambda layer: False)[0]) is Popup
    with pytest.raises(ValueError, match="found none; left: Popup .*; own_forward=True takes the weights of layers"):
        fnn.convert(net[0], 0.5, 1.0)
    with pytest.raises(TypeError, match="own_forward: expected a bool or a function of a layer, got str"):
        fnn.convert(net, 0.5, 1.0, own_forward="Popup")
    with pytest.warns(UserWarning, match="the forwards that 0 had compute something else"):  # the mask is of |scores|
        raw = fnn.convert(net, 0.7, 1.0, init="given", own_forward=True, absolute=False)
    assert raw[0].absolute is False


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Demanding(nn.Linear):
    def forward(self, x: Tensor, twice: bool) -> Tensor:
        return super().forward(x) * (1 + twice)


def test_forwards_that_are_more_than_a_mask_are_named() -> None:
    net = nn.Sequential(Popup(3, 8, 3), Popup(8, 8, 1), Standardised(8, 4, 3), nn.Conv2d(4, 4, 1), Demanding(3, 3))
    net[1].share = 0.9
    with pytest.warns(UserWarning, match="the forwards that 1, 2, 4 had compute something else than the masked layers"):
        fnn.convert(net, 0.7, 1.0, init="given", method="layerwise", own_forward=True)


def test_scores_that_are_drawn_anew_are_told_of() -> None:
    net = nn.Sequential(Popup(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.warns(UserWarning, match="init='given' takes them and the weights over"):
        drawn = fnn.convert(net, 0.5, 1.0, own_forward=True)
    net[0].share = 0.5
    assert not torch.equal(drawn[0].scores, net[0].scores) and drawn[0].signs.dtype == torch.int8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fnn.convert(net, 0.5, 1.0, own_forward=True, init="binary")
        fnn.convert(net, 0.5, 1.0, own_forward=True, init="given")
        fnn.convert(nn.Conv2d(2, 3, 3), 0.5, 1.0)


def test_one_weight_under_two_masks() -> None:
    """Layers that share a weight and have scores of their own keep their own masks."""
    net = nn.Sequential(Popup(4, 4, 3, padding=1, bias=False), nn.ReLU(), Popup(4, 4, 3, padding=1, bias=False))
    net[2].weight = net[0].weight
    masked = fnn.convert(net, 0.7, 1.0, init="given", method="layerwise", own_forward=True)
    x = torch.randn(2, 4, 6, 6)
    near(masked(x), net.double()(x.double()))
    net[2].scores = net[0].scores
    masked = fnn.convert(net.float(), 0.7, 1.0, init="given", method="layerwise", own_forward=True)
    assert masked[2].scores is masked[0].scores and masked[2].signs is masked[0].signs
    near(masked(x), net.double()(x.double()))


# ---- magnitude pruning ----


def pruned(rate: float) -> nn.Module:
    """By torch's own pruning, layer by layer."""
    torch.manual_seed(4)
    model = Hidden(nn.Conv2d)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            prune.l1_unstructured(m, "weight", int(rate * m.weight.numel()))
            prune.remove(m, "weight")
    return settled(model)


@pytest.mark.parametrize("path", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("rate", [0.0, 0.9])
def test_a_pruned_network_from_end_to_end(path: str, rate: float, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    dense = pruned(0.9)
    model = fnn.convert(dense, rate, 1.0, method="layerwise", init="given")
    for name, packed in fnn.pack(model).items():
        weight = dense.get_submodule(name).weight
        assert packed.values is not None and packed.kept == int((weight != 0).sum())
        assert torch.equal(packed.to_dense(), weight)
    x = torch.rand(5, 3, 12, 12)
    exact, exact_grad = passes(copy.deepcopy(dense).double(), x.double())
    frozen = fnn.freeze(model)
    size = fnn.save_packed(model, tmp_path / "model")
    assert size < 4000 + sum(5 * p.kept for p in fnn.pack(model).values())
    targets = [Hidden(nn.Conv2d), fnn.convert(Hidden(nn.Conv2d), 0.5, 1.0), copy.deepcopy(model)]
    loaded = [fnn.load_packed(tmp_path / "model", target).eval() for target in targets]
    small = fnn.compact(model, x)
    for other in (model, frozen, small, fnn.dense_copy(model), copy.deepcopy(model), *loaded):
        out, grad = passes(other, x)
        near(out, exact)
        near(grad, exact_grad)
    for other in loaded:
        assert torch.equal(other(x), model(x)) and torch.equal(fnn.freeze(other)(x), frozen(x))
        fnn.save_packed(other, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()
    back, want = fnn.dense_state_dict(model), dense.state_dict()
    assert back.keys() == want.keys() and all(torch.equal(back[name], want[name]) for name in want)


@pytest.mark.parametrize("rate", [0.5, 0.93])
def test_given_weights_are_pruned_by_magnitude(rate: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Flatten(), nn.Linear(28, 9))
    masked = fnn.convert(net, rate, 1.0, init="given", method="layerwise")
    for ours, theirs in zip(fnn.masked_layers(masked).values(), (net[0], net[2]), strict=True):
        left = copy.deepcopy(theirs)
        prune.l1_unstructured(left, "weight", int(rate * left.weight.numel()))
        assert torch.equal(ours.dense_weight(), left.weight) and not ours.absolute


def test_compact_cuts_what_pruning_left_dead() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        net[2].weight[:, [1, 5]] = 0
        net[0].weight.mul_(0.3)
    masked = fnn.convert(net, 0.0, 1.0)
    small = fnn.compact(masked, torch.rand(2, 3, 9, 9))
    assert small[0].out_channels == 6 and small[0].signs.is_floating_point()
    x = torch.rand(4, 3, 9, 9)
    near(small(x), net.double()(x.double()))


# ---- what is given by default ----


def test_nothing_pruned_is_the_model_itself() -> None:
    net = settled(Hidden(nn.Conv2d))
    x = torch.rand(3, 3, 12, 12)
    masked = fnn.convert(net, 0.0, 1.0)
    near(masked(x), net(x))
    assert all(
        torch.equal(layer.dense_weight(), net.get_submodule(n).weight) for n, layer in fnn.masked_layers(masked).items()
    )
    for options in ({"init": "binary"}, {"signs": "random"}):
        assert all(
            layer.signs.dtype == torch.int8 for layer in fnn.masked_layers(fnn.convert(net, 0, 1.0, **options)).values()
        )
    assert fnn.convert(net, 0.5, 1.0).first.signs.dtype == torch.int8
    scaled = fnn.convert(net, 0.0, 1.0, init="signed_constant").first
    assert set(scaled.signs.unique().tolist()) <= {-1, 0, 1} and float(scaled.magnitude) != 1


def test_bad_arguments() -> None:
    net = nn.Conv2d(2, 3, 3)
    with pytest.raises(
        ValueError, match=r"init: expected one of \('given', 'binary', 'signed_constant'\) or None, got 'kaiming'"
    ):
        fnn.convert(net, 0.5, 1.0, init="kaiming")
    with pytest.raises(ValueError, match="signs: expected 'weights' with init='given', got 'random'"):
        fnn.convert(net, 0.5, 1.0, init="given", signs="random")
    with pytest.raises(ValueError, match="gamma: expected 1 with method 'layerwise', got 0.5"):
        fnn.convert(net, 0.5, 0.5, init="given", method="layerwise")
    with pytest.raises(ValueError, match=r"weight: expected \(3, 2, 3, 3\), got \(3, 2\)"):
        fnn.convert(net, 0.5, 1.0).fix_weight(torch.zeros(3, 2))
    broken = copy.deepcopy(net)
    broken.weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="model: Conv2d has weights that are not finite"):
        fnn.convert(broken, 0.5, 1.0, init="given")
    assert fnn.convert(broken, 0.5, 1.0).signs[0, 0, 0, 0] == 1
    popup = Popup(2, 3, 3)
    popup.scores.data[0] = torch.nan
    with pytest.raises(ValueError, match="model: Popup has scores that are not finite"):
        fnn.convert(popup, 0.5, 1.0, init="given", own_forward=True)


# ---- the layers ----


def layer_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    made: nn.Module
    if kind == "conv":
        made, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, dtype=dtype), torch.randn(3, 4, 8, 7, dtype=dtype)
    else:
        made, x = nn.Linear(11, 6, dtype=dtype), torch.randn(3, 2, 11, dtype=dtype)
    return fnn.convert(made, 0.4, 1.0, init="given"), x


def by_torch(layer: nn.Module, x: Tensor) -> Tensor:
    mask = torch.zeros_like(layer.scores).flatten()
    mask[layer.scores.flatten().argsort()[-layer.keep :]] = 1
    weight = layer.signs * (mask.view_as(layer.scores) + layer.scores - layer.scores.detach())
    if x.dim() == 4:
        return F.conv2d(x, weight, layer.bias, 2, 1, 1, 2)
    return F.linear(x, weight, layer.bias)


@pytest.mark.parametrize("kind", ["conv", "linear"])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_gradients_of_every_order(kind: str, path: str, monkeypatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    layer, x = layer_of(kind)
    wanted = (x.requires_grad_(), layer.scores, layer.bias)
    for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out, exact = f(x), by_torch(layer, x)
        near(out, exact)
        ours = torch.autograd.grad((out**3).sum(), wanted, create_graph=f is layer)
        truth = torch.autograd.grad((exact**3).sum(), wanted, create_graph=True)
        for a, b in zip(ours, truth, strict=True):
            near(a, b)
    for a, b in zip(
        torch.autograd.grad(
            sum((g**2).sum() for g in torch.autograd.grad((layer(x) ** 3).sum(), wanted, create_graph=True)), wanted
        ),
        torch.autograd.grad(sum((g**2).sum() for g in truth), wanted),
        strict=True,
    ):
        near(a, b)
    parameters = {"scores": layer.scores.detach()}
    ours = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x.detach(),)).pow(3).sum())(parameters)
    near(ours["scores"], truth[1])


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_float64_layers_are_exact(kind: str, tmp_path) -> None:
    layer, x = layer_of(kind, torch.float64)
    assert layer.signs.dtype == torch.float64
    torch.testing.assert_close(layer(x), by_torch(layer, x), rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),))
    near(layer(x.float()), layer(x))
    fnn.save_packed(layer, tmp_path / "layer")
    again, _ = layer_of(kind, torch.float64)
    assert torch.equal(fnn.load_packed(tmp_path / "layer", again)(x), layer(x))
    with pytest.raises(
        ValueError, match="model: expected '' of type torch.float64, as the file has, got torch.float32"
    ):
        fnn.load_packed(tmp_path / "layer", layer_of(kind)[0])


def test_state_dicts_between_signs_and_numbers() -> None:
    """A state_dict goes into a layer that held the other kind: nothing is cut to integers."""
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    net.append(nn.Conv2d(4, 4, 3))
    net[2].weight = net[1].weight
    x = torch.randn(2, 3, 9, 9)
    for rate in (0.0, 0.4):
        real, signed = (fnn.convert(net, rate, 1.0, init=init) for init in ("given", "binary"))
        for source, target in ((real, signed), (signed, real), (real, real)):
            target = copy.deepcopy(target)
            target(x)
            target.load_state_dict(source.state_dict())
            assert torch.equal(target(x), source(x)) and target[2].signs is target[1].signs
            target.load_state_dict(source.state_dict(), assign=True)
            assert torch.equal(target(x), source(x))
    again = pickle.loads(pickle.dumps(real))
    assert torch.equal(again(x), real(x))


def test_weights_that_change_are_seen() -> None:
    layer, x = layer_of("conv")
    layer(x)
    with torch.no_grad():
        layer.signs.mul_(0.5)
    near(layer(x), by_torch(layer, x))
    layer.signs.data[0] *= 3  # past torch's counting
    near(layer(x), by_torch(layer, x))
    frozen = fnn.freeze(layer)
    near(frozen(x), by_torch(layer, x))
    with torch.no_grad():
        layer.signs.neg_()
    frozen.update()
    near(frozen(x), by_torch(layer, x))
    near(layer.double()(x.double()), by_torch(layer, x.double()))


def test_scores_of_given_weights_learn() -> None:
    """Edge-popup of a magnitude-pruned network: its weights stay, its mask moves, its frozen copies follow."""
    torch.manual_seed(7)
    model = fnn.convert(settled(Hidden(nn.Conv2d)), 0.6, 0.5, init="given")
    weights = {n: layer.signs.clone() for n, layer in fnn.masked_layers(model).items()}
    masks = {n: layer.mask() for n, layer in fnn.masked_layers(model).items()}
    x, y = torch.rand(8, 3, 12, 12), torch.randint(0, 5, (8,))
    sgd = torch.optim.SGD([layer.scores for layer in fnn.masked_layers(model).values()], lr=0.3)
    training.edge_popup(model, [(x, y)] * 3, epochs=1, eps=0.03, steps=2, optimizer=sgd)
    moved = 0
    for n, layer in fnn.masked_layers(model).items():
        assert torch.equal(layer.signs, weights[n]) and int(layer.mask().sum()) == layer.keep
        moved += int((layer.mask() != masks[n]).sum())
        near(layer.dense_weight(), layer.signs * layer.mask())
    assert moved
    near(fnn.freeze(model)(x), model.eval()(x))
    adversarial = fr.attacks.pgd(fnn.freeze(model), x, y, eps=0.03, steps=2)
    assert float((adversarial - x).abs().max()) <= 0.03
