"""Packed files: small, exact, and refused when damaged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastrobust import nn as fnn
from fastrobust.nn import storage


def trained(rate: float = 0.9, **options) -> nn.Module:
    model = fnn.convert(fnn.resnet18(width=4, **options), rate, 0.3, init="signed_constant")
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 20)
    return model.eval()


@given(
    size=st.integers(0, 3000),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_gap_codes_round_trip(size: int, density: float, seed: int) -> None:
    positions = np.flatnonzero(np.random.default_rng(seed).random(size) < density)
    data, code = storage._encode(positions, size)
    assert np.array_equal(storage._decode(data, size, code), positions)


def test_gap_codes_are_near_the_entropy() -> None:
    size, density = 2_000_000, 0.01
    positions = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    data, _ = storage._encode(positions, size)
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) * size / 8
    assert len(data) < 1.05 * entropy


@pytest.mark.parametrize("into", ["masked", "dense"])
def test_loads_to_bit_identical_outputs(into: str, tmp_path) -> None:
    model = trained(affine=True)
    size = fnn.save_packed(model, tmp_path / "model")
    assert size == (tmp_path / "model").stat().st_size
    empty = fnn.resnet18(width=4, affine=True)
    loaded = fnn.load_packed(tmp_path / "model", fnn.convert(empty, 0.5, 1.0) if into == "masked" else empty).eval()
    x = torch.rand(5, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(fnn.freeze(loaded)(x), fnn.freeze(model)(x))
    assert fnn.pack(loaded).keys() == fnn.pack(model).keys()
    assert type(empty.conv1) is nn.Conv2d  # the argument is not touched


def test_zero_signs_and_full_layers(tmp_path) -> None:
    model = fnn.convert(fnn.small_cnn(width=4), 0.0, 1.0).eval()
    model[0].signs[0] = 0
    model[0].refresh()
    fnn.save_packed(model, tmp_path / "model")
    x = torch.rand(2, 1, 10, 10)
    assert torch.equal(fnn.load_packed(tmp_path / "model", fnn.small_cnn(width=4)).eval()(x), model(x))


def test_a_packed_resnet34_is_small(tmp_path) -> None:
    model = fnn.convert(fnn.resnet34(), 0.99, 0.1).eval()
    assert fnn.save_packed(model, tmp_path / "model") <= 250_000
    loaded = fnn.load_packed(tmp_path / "model", fnn.resnet34()).eval()
    for name, packed in fnn.pack(model).items():
        assert torch.equal(packed.index, fnn.pack(loaded)[name].index)


def test_damaged_files_are_refused(tmp_path) -> None:
    path = tmp_path / "model"
    fnn.save_packed(trained(), path)
    good = path.read_bytes()
    model = fnn.resnet18(width=4)
    for at in (0, 7, 9, 40, len(good) // 2, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 0x40
        path.write_bytes(bytes(bad))
        with pytest.raises(ValueError, match="path: expected a packed model, got"):
            fnn.load_packed(path, model)
    for bad in (b"", good[:20], good[:-1], good + b"x", b"PK" + good):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="path: expected a packed model, got"):
            fnn.load_packed(path, model)


def test_another_architecture_is_refused(tmp_path) -> None:
    path = tmp_path / "model"
    fnn.save_packed(trained(), path)
    with pytest.raises(ValueError, match=r"model: expected 'conv1' of shape \(4, 3, 3, 3\)"):
        fnn.load_packed(path, fnn.resnet18(width=8))
    with pytest.raises(ValueError, match="model: expected a convolution or linear layer"):
        fnn.load_packed(path, fnn.small_cnn())
    with pytest.raises(ValueError, match="model: expected at least one masked layer"):
        fnn.save_packed(fnn.small_cnn(), path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    fnn.save_packed(trained(), path)
    good = path.read_bytes()
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fnn.save_packed(trained(0.5), path)
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]
