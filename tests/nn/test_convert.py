"""What convert and its way back do with layers as people hold them: shared, subclassed, frozen, hooked, alone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fastrobust import nn as fnn
from fastrobust.nn.masked import MaskedLayer


class Held(nn.Module):
    """One convolution by three names, one of them in a plain list, and linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Sequential(self.a, nn.ReLU())])
        self.steps = [self.a, {"last": (self.a, nn.ReLU())}]
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.steps[1]["last"][0](self.steps[0](self.blocks[0](self.a(x))))
        return self.down(self.up(x.mean((2, 3))))


def test_a_layer_is_masked_under_all_its_names() -> None:
    model = fnn.convert(Held(), 0.6, 1.0)
    assert isinstance(model.a, fnn.BinaryMaskedConv2d)
    assert model.blocks[0][0] is model.a and model.steps[0] is model.a and model.steps[1]["last"][0] is model.a
    assert model.up.scores is model.down.scores and model.up.signs is model.down.signs
    assert model.a.keep + model.up.keep == int(0.4 * (144 + 16)) and model.up.keep == model.down.keep
    assert model.up.bias is not None and model.down.bias is None and model.left_out == {}
    x = torch.randn(3, 4, 5, 5)
    want = model(x)
    dense = fnn.dense_copy(model)
    assert type(dense.a) is nn.Conv2d and dense.blocks[0][0] is dense.a and dense.steps[1]["last"][0] is dense.a
    assert dense.down.weight is dense.up.weight
    torch.testing.assert_close(dense(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fnn.freeze(model.eval())(x), want, rtol=1e-4, atol=1e-4)
    assert dense.state_dict().keys() == Held().state_dict().keys()


def test_shared_layers_go_through_files(tmp_path) -> None:
    model = fnn.convert(Held(), 0.6, 1.0)
    fnn.save_packed(model, tmp_path / "model")
    x = torch.randn(3, 4, 5, 5)
    for target in (Held(), fnn.convert(Held(), 0.1, 1.0)):
        loaded = fnn.load_packed(tmp_path / "model", target)
        assert loaded.blocks[0][0] is loaded.a and loaded.steps[1]["last"][0] is loaded.a
        assert torch.equal(loaded(x), model(x))


class Named(nn.Conv2d):
    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.scores = nn.Parameter(torch.zeros_like(self.weight))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Padded(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 0, 1, 0)), weight, bias)


def test_what_is_left_out_is_named() -> None:
    tied = nn.Linear(6, 9, bias=False)
    table = nn.Embedding(9, 6)
    tied.weight = table.weight
    patched = nn.Linear(3, 3)
    patched.forward = lambda x: x
    net = nn.ModuleDict({
        "plain": nn.Conv2d(2, 3, 3), "named": Named(2, 3, 3), "own": Standardised(2, 3, 3), "padded": Padded(2, 3, 3),
        "norm": weight_norm(nn.Linear(3, 4)), "attention": nn.MultiheadAttention(4, 2), "line": nn.Conv1d(2, 3, 3),
        "up": nn.ConvTranspose2d(2, 3, 3), "table": table, "tied": tied, "patched": patched,
        "layer_norm": nn.LayerNorm((3, 4)),
        "masked": fnn.BinaryMaskedLinear(3, 3), "lazy": nn.LazyLinear(3), "last": nn.Linear(3, 3),
    })  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"left as they are: .*own \(Standardised has a forward of its own\)"
    ) as record:
        model = fnn.convert(net, 0.5, 1.0, last_dense=True, init="binary")
    assert "last" not in str(record[0].message)
    assert isinstance(model["plain"], fnn.BinaryMaskedConv2d) and isinstance(model["named"], fnn.BinaryMaskedConv2d)
    assert set(model.left_out) == set(net) - {"plain", "named", "layer_norm"}
    for name, why in {
        "own": "Standardised has a forward of its own", "padded": "Padded has a forward", "norm": "computed by",
        "attention": "neither Conv2d nor Linear", "line": "Conv1d is neither", "tied": "shares its weight with table",
        "patched": "Linear has a forward", "masked": "masked already", "lazy": "no weights yet", "last": "last_dense",
    }.items():  # fmt: skip
        assert why in model.left_out[name]
    for name in ("own", "padded", "norm", "attention", "tied", "last"):
        assert type(model[name]) is type(net[name])
    with pytest.raises(ValueError, match=r"found none; left: Standardised \(Standardised has a forward"):
        fnn.convert(Standardised(2, 3, 3), 0.5, 1.0)


def test_nothing_is_said_when_nothing_is_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fnn.convert(fnn.resnet18(width=4), 0.9, 0.3, first_dense=True).left_out == {"conv1": "first_dense"}


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(5, 4)])
def test_a_model_that_is_itself_a_layer(layer: nn.Module, tmp_path) -> None:
    masked = fnn.convert(layer, 0.5, 1.0)
    assert isinstance(masked, MaskedLayer) and masked.keep == layer.weight.numel() // 2
    x = torch.randn(2, 3, 7, 7) if isinstance(layer, nn.Conv2d) else torch.randn(2, 5)
    back = fnn.dense_copy(masked)
    assert type(back) is type(layer)
    torch.testing.assert_close(back(x), masked(x), rtol=1e-5, atol=1e-5)
    fnn.save_packed(masked, tmp_path / "layer")
    for target in (layer, fnn.convert(layer, 0.0, 1.0)):
        assert torch.equal(fnn.load_packed(tmp_path / "layer", target)(x), masked(x))


def test_modes_flags_types_and_hooks_are_kept() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)).double()
    net[0].weight.requires_grad_(False)
    net[3].bias.requires_grad_(False)
    net[0].eval()
    seen: list[str] = []
    net[0].register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    net[3].register_forward_pre_hook(lambda m, args, kwargs: seen.append("pre"), with_kwargs=True)
    model = fnn.convert(net, 0.5, 1.0)
    back = fnn.dense_copy(model)
    for m in (model, back):
        assert [m[0].training, m[3].training] == [False, True]
        weights = [getattr(m[i], "scores", None) if m is model else m[i].weight for i in (0, 3)]
        assert [w.requires_grad for w in weights] == [False, True]
        assert [m[0].bias.requires_grad, m[3].bias.requires_grad] == [True, False]
        assert all(t.dtype == torch.float64 for t in m.parameters()) and torch.equal(m[0].bias, net[0].bias)
        m(torch.randn(2, 2, 5, 5, dtype=torch.float64))
    assert seen == ["BinaryMaskedConv2d", "pre", "Conv2d", "pre"]
    assert model[0].bias is not net[0].bias


@pytest.mark.parametrize(
    "padding, kernel, dilation", [("valid", 3, 1), ("same", 3, 2), ("same", (1, 5), 1), ("same", 2, 2)]
)
def test_padding_by_name(padding: str, kernel: int | tuple[int, int], dilation: int) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, kernel, padding=padding, dilation=dilation))
    model, x = fnn.convert(net, 0.4, 1.0), torch.randn(2, 2, 9, 8)
    torch.testing.assert_close(
        model(x),
        F.conv2d(x, model[0].dense_weight(), model[0].bias, padding=padding, dilation=dilation),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_padding_that_cannot_be_masked(options: dict, tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2, **options))
    with pytest.raises(ValueError, match="model: 0 has padding"):
        fnn.convert(net, 0.5, 1.0)
    fnn.save_packed(fnn.convert(nn.Sequential(nn.Conv2d(2, 3, 2)), 0.5, 1.0), tmp_path / "model")
    with pytest.raises(ValueError, match="model: 0 has padding"):
        fnn.load_packed(tmp_path / "model", net)


def test_weights_without_a_sign_are_refused() -> None:
    net = nn.Linear(3, 3)
    net.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match="model: Linear has NaN weights"):
        fnn.convert(net, 0.5, 1.0)


def test_numbers_of_numpy() -> None:
    rate, gamma = np.float32(0.9), np.float32(0.5)
    assert fnn.allocate([100, 200], rate, gamma) == fnn.allocate([100, 200], 0.9, 0.5)
    layer = fnn.BinaryMaskedConv2d(np.int64(2), np.int32(4), np.int64(3), stride=np.int64(2), keep=np.int64(7))
    assert layer.packed().kept == 7 and type(layer.keep) is int
    assert layer(torch.zeros(1, 2, 5, 5)).shape == (1, 4, 2, 2)
    assert fnn.convert(nn.Linear(10, 10), rate, gamma).keep == 10
