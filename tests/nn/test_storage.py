"""Packed files: small, exact, and refused when damaged."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastrobust import nn as fnn
from fastrobust.nn import storage
from fastrobust.nn.masked import seeded_signs
from fastrobust.ops.binary._mask_code import decode_mask, encode_mask
from fastrobust.reference import binary as reference

SIGNS_OF_2026 = [-1, -1, -1, 1, -1, -1, 1, 1, 1, 1, 1, 1, -1, -1, 1, -1]


def with_statistics(model: nn.Module) -> nn.Module:
    """Running statistics with random mantissas, as training leaves them."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 20)
    return model.eval()


def trained(rate: float = 0.9, signs: str = "weights", **options) -> nn.Module:
    net = fnn.resnet18(width=4, **options)
    return with_statistics(fnn.convert(net, rate, 0.3, init="signed_constant", signs=signs))


@given(
    size=st.integers(0, 400),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_mask_codes_equal_the_reference_and_decode(size: int, density: float, seed: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < density
    kept = int(mask.sum())
    data = encode_mask(mask)
    assert data == reference.encode_mask(mask.tolist())
    assert len(data) <= math.log2(math.comb(size, kept)) / 8 + 1.01
    assert torch.equal(decode_mask(data, size, kept), mask)
    assert reference.decode_mask(data, size, kept) == mask.tolist()


@pytest.mark.parametrize("density", [0.003, 0.3, 0.9])
def test_mask_codes_reach_the_entropy(density: float) -> None:
    size = 2_000_000
    mask = torch.rand(size) < density
    kept = int(mask.sum())
    choices = (math.lgamma(size + 1) - math.lgamma(kept + 1) - math.lgamma(size - kept + 1)) / math.log(2)
    data = encode_mask(mask)
    assert len(data) <= choices / 8 + 3
    assert torch.equal(decode_mask(data, size, kept), mask)


@given(data=st.binary(max_size=40), size=st.integers(0, 300), share=st.floats(0, 1))
def test_any_bytes_decode_to_a_mask_of_the_stated_count(data: bytes, size: int, share: float) -> None:
    kept = round(share * size)
    mask = decode_mask(data, size, kept)
    assert int(mask.sum()) == kept and mask.tolist() == reference.decode_mask(data, size, kept)
    with pytest.raises(ValueError, match=f"kept: expected 0 to {size}"):
        decode_mask(data, size, size + 1)


def test_signs_of_a_seed_do_not_change() -> None:
    signs = seeded_signs(2026, 100_000)
    assert set(signs.tolist()) == {-1, 1} and abs(float(signs.double().mean())) < 0.01
    assert signs[:16].tolist() == SIGNS_OF_2026
    assert torch.equal(seeded_signs(2026, 77), signs[:77])
    layer = fnn.BinaryMaskedConv2d(4, 6, 3, keep=9)
    assert torch.equal(layer.signs.flatten(), seeded_signs(layer.sign_seed, 216))


@pytest.mark.parametrize("into", ["masked", "dense"])
@pytest.mark.parametrize("signs", ["weights", "random"])
def test_loads_to_bit_identical_outputs(into: str, signs: str, tmp_path) -> None:
    model = trained(signs=signs, affine=True)
    size = fnn.save_packed(model, tmp_path / "model")
    assert size == (tmp_path / "model").stat().st_size
    empty = fnn.resnet18(width=4, affine=True)
    loaded = fnn.load_packed(tmp_path / "model", fnn.convert(empty, 0.5, 1.0) if into == "masked" else empty).eval()
    x = torch.rand(5, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(fnn.freeze(loaded)(x), fnn.freeze(model)(x))
    assert fnn.pack(loaded).keys() == fnn.pack(model).keys()
    assert fnn.save_packed(loaded, tmp_path / "again") == size
    assert type(empty.conv1) is nn.Conv2d  # the argument is not touched


def test_zero_signs_and_full_layers(tmp_path) -> None:
    model = fnn.convert(fnn.small_cnn(width=4), 0.0, 1.0, init="binary").eval()
    model[0].signs[0] = 0
    model[0].refresh()
    fnn.save_packed(model, tmp_path / "model")
    x = torch.rand(2, 1, 10, 10)
    assert torch.equal(fnn.load_packed(tmp_path / "model", fnn.small_cnn(width=4)).eval()(x), model(x))


def test_signs_that_were_changed_are_stored_as_bits(tmp_path) -> None:
    model = fnn.convert(fnn.small_cnn(width=4), 0.5, 1.0, signs="random").eval()
    small = fnn.save_packed(model, tmp_path / "seed")
    layer = model[3]
    with torch.no_grad():
        layer.signs.neg_()
    assert small < fnn.save_packed(model, tmp_path / "bits")
    x = torch.rand(2, 1, 10, 10)
    assert torch.equal(fnn.load_packed(tmp_path / "bits", fnn.small_cnn(width=4)).eval()(x), model(x))


def test_a_packed_resnet34_is_small(tmp_path) -> None:
    """With signs of its own and statistics that do not compress; given signs take a bit a kept weight more."""
    model = with_statistics(fnn.convert(fnn.resnet34(), 0.99, 0.1, signs="random"))
    size = fnn.save_packed(model, tmp_path / "model")
    assert size <= 250_000
    loaded = fnn.load_packed(tmp_path / "model", fnn.resnet34()).eval()
    for name, packed in fnn.pack(model).items():
        assert torch.equal(packed.index, fnn.pack(loaded)[name].index)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(fnn.freeze(loaded)(x), fnn.freeze(model)(x))
    for layer in fnn.masked_layers(model).values():
        layer.sign_seed = None
    assert fnn.save_packed(model, tmp_path / "model") <= size + 212_650 / 8 + 40


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
