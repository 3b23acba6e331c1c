"""Packed files of strangers: a right checksum over anything at all."""

from __future__ import annotations

import copy
import hashlib
import json
import lzma
import os
import pathlib
import re
import stat
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrobust import nn as fnn
from fastrobust.nn import storage

REFUSED = r"^(path: expected a packed model, got|model: (expected|got))"


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )


@pytest.fixture(scope="module", params=["binary", "given"])
def written(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any], bytes]:
    """A path to write to, and header and payload of a good file, of signs and of other weights."""
    path = tmp_path_factory.mktemp("forged") / "model"
    torch.manual_seed(7)
    masked = fnn.convert(model(), 0.5, 0.5, init=request.param)
    fnn.save_packed(masked, path)
    body = path.read_bytes()
    (length,) = struct.unpack_from("<I", body, 8)
    return path, json.loads(zlib.decompress(body[12 : 12 + length])), body[12 + length : -32]


def forged(header: Any, payload: bytes, text: bytes | None = None, version: int = storage.VERSION) -> bytes:
    text = zlib.compress(json.dumps(header).encode()) if text is None else text
    body = storage.MAGIC + struct.pack("<HI", version, len(text)) + text + payload
    return body + hashlib.sha256(body).digest()


def load(path: pathlib.Path, body: bytes) -> nn.Module:
    path.write_bytes(body)
    return fnn.load_packed(path, model())


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 40)
    | st.integers(1 << 30, 1 << 70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["float32", "float64", "float16", "bool", "load", "0.weight", "1.running_var", "qint8", "device"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_any_field_may_be_anything(data: st.DataObject, written) -> None:
    """A file with one field changed is refused, or is one of this architecture: then it runs and saves as itself."""
    path, good, payload = written
    header = copy.deepcopy(good)
    group = data.draw(st.sampled_from(["layers", "tensors", "whole"]))
    if group == "whole":
        change = data.draw(st.sampled_from(["replace", "drop", "list", "extra"]))
        key = data.draw(st.sampled_from(["layers", "tensors"]))
        if change == "replace":
            header = data.draw(json_values)
        elif change == "drop":
            del header[key]
        elif change == "list":
            header[key] = data.draw(json_values)
        else:
            header["more"] = data.draw(json_values)
    else:
        entries = header[group]
        at = data.draw(st.integers(0, len(entries) - 1))
        key = data.draw(st.sampled_from(sorted(entries[at])))
        change = data.draw(st.sampled_from(["value", "drop", "remove", "twice", "swap", "near"]))
        if change == "value":
            entries[at][key] = data.draw(json_values)
        elif change == "near":
            old = entries[at][key]
            number = st.integers(-3, 3)
            if isinstance(old, list):
                entries[at][key] = [n + data.draw(number) for n in old]
            elif isinstance(old, (int, float)):
                entries[at][key] = old + data.draw(number)
        elif change == "drop":
            del entries[at][key]
        elif change == "remove":
            del entries[at]
        elif change == "twice":
            entries.append(copy.deepcopy(entries[at]))
        else:
            entries.reverse()
    try:
        found = load(path, forged(header, payload))
    except ValueError as error:
        assert re.search(REFUSED, str(error)), error
        return
    found.eval()(torch.zeros(1, 2, 6, 6))
    layers = fnn.masked_layers(found)
    assert {n: layer.keep for n, layer in layers.items()} == {e["name"]: e["kept"] for e in header["layers"]}
    size = fnn.save_packed(found, path)
    again = fnn.load_packed(path, model())
    assert size == path.stat().st_size
    for name, value in found.state_dict().items():
        same = again.state_dict()[name]
        assert torch.equal(value, same) if isinstance(value, Tensor) and not value.isnan().any() else True


@given(tail=st.binary(max_size=60), cut=st.integers(0, 200))
def test_any_payload(tail: bytes, cut: int, written) -> None:
    path, header, payload = written
    changed = payload[: len(payload) - cut] + tail
    if changed == payload:
        return
    try:
        load(path, forged(header, changed))
    except ValueError as error:
        assert str(error).startswith("path: expected a packed model, got"), error
    else:
        # Other bytes of LZMA may stand for the same number of others; of the length that was promised in any case.
        assert cut or tail == b""


@given(body=st.binary(max_size=300))
def test_any_header_text(body: bytes, written) -> None:
    path, _, payload = written
    for text in (body, zlib.compress(body)):
        with pytest.raises(ValueError, match="^path: expected a packed model, got"):
            load(path, forged(None, payload, text))


def _bomb(size: int) -> bytes:
    return lzma.compress(b"\0" * size, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 1}])


def _large(kind: str, header: dict[str, Any], payload: bytes) -> bytes:
    stored = sum(e["bytes"] + (4 * e["kept"] if e["values"] else -(-e["kept"] // 8)) for e in header["layers"])
    if kind == "tensors":
        return forged(header, payload[:stored] + _bomb(1 << 28))
    if kind == "header":
        return forged(header, payload, zlib.compress(b" " * (1 << 28), 9))
    if kind == "nested":
        return forged(header, payload, zlib.compress(b"[" * 900_000))
    if kind == "digits":
        return forged(header, payload, zlib.compress(b"[" + b"9" * 900_000 + b"]"))
    if kind == "layer":
        large = {"shape": [1 << 15, (1 << 15) - 1], "kept": 0, "bytes": 0, "seed": 3, "values": None}
        header["layers"][0] |= large
    elif kind == "tensor":
        header["tensors"][0]["shape"] = [1 << 30]
    else:
        return forged(header, payload + b"\0" * (1 << 26))
    return forged(header, payload)


@pytest.mark.parametrize("kind", ["tensors", "header", "nested", "digits", "layer", "tensor", "file"])
def test_small_files_make_nothing_large(kind: str, written) -> None:
    path, header, payload = written
    path.write_bytes(_large(kind, copy.deepcopy(header), payload))
    target = model()
    tracemalloc.start()
    with pytest.raises(ValueError, match=REFUSED):
        fnn.load_packed(path, target)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize("bad", [0.0, -0.0, float("inf"), float("nan")])
def test_weights_that_no_file_of_ours_has(bad: float, tmp_path) -> None:
    fnn.save_packed(fnn.convert(model(), 0.5, 0.5, init="given"), tmp_path / "model")
    body = (tmp_path / "model").read_bytes()
    (length,) = struct.unpack_from("<I", body, 8)
    header, payload = json.loads(zlib.decompress(body[12 : 12 + length])), body[12 + length : -32]
    at = header["layers"][0]["bytes"]
    changed = payload[:at] + struct.pack("<f", bad) + payload[at + 4 :]
    with pytest.raises(ValueError, match="path: expected a packed model, got a layer '0' that keeps weights of zero"):
        load(tmp_path / "model", forged(header, changed))
    for values in ("float64", "int8", 1, True, ["float32"]):
        header["layers"][0]["values"] = values
        with pytest.raises(ValueError, match=REFUSED):
            load(tmp_path / "model", forged(header, payload))
    header["layers"][0] |= {"values": "float32", "seed": 4}
    with pytest.raises(ValueError, match="got a layer '0' with weights of type 'float32'"):
        load(tmp_path / "model", forged(header, payload))


def test_files_of_version_2_are_read(tmp_path) -> None:
    """They say nothing of values; a file that is older or newer than what is known is refused."""
    torch.manual_seed(8)
    masked = fnn.convert(model(), 0.5, 0.5, init="binary")
    fnn.save_packed(masked, tmp_path / "model")
    body = (tmp_path / "model").read_bytes()
    (length,) = struct.unpack_from("<I", body, 8)
    header, payload = json.loads(zlib.decompress(body[12 : 12 + length])), body[12 + length : -32]
    for entry in header["layers"]:
        assert entry.pop("values") is None
    loaded = load(tmp_path / "old", forged(header, payload, version=2))
    x = torch.rand(2, 2, 6, 6)
    assert torch.equal(loaded.eval()(x), masked.eval()(x))
    with pytest.raises(ValueError, match="one in which a layer is"):
        load(tmp_path / "old", forged(header, payload, version=3))
    for version in (0, 1, storage.VERSION + 1):
        with pytest.raises(ValueError, match=f"got version {version}; this release reads versions 2 to 3"):
            load(tmp_path / "old", forged(header, payload, version=version))


def test_a_larger_model_is_refused_by_what_the_file_lacks(tmp_path) -> None:
    fnn.save_packed(fnn.convert(model(), 0.5, 0.5), tmp_path / "model")
    for more in (nn.Linear(3, 2), nn.BatchNorm1d(3, affine=False), fnn.BinaryMaskedLinear(3, 2)):
        with pytest.raises(ValueError, match=r"model: got '6\.\w+', .* expected nothing that the file lacks"):
            fnn.load_packed(tmp_path / "model", nn.Sequential(*model(), more))
    plain = model()
    plain[1] = nn.BatchNorm2d(6, affine=False)
    with pytest.raises(ValueError, match=r"model: expected a tensor '1.bias' of shape \(6,\) float32, .* got none"):
        fnn.load_packed(tmp_path / "model", plain)
    with pytest.raises(ValueError, match=r"model: expected a tensor '0.bias' of shape \(6,\) float32, .* float64"):
        fnn.load_packed(tmp_path / "model", model().double())


def test_state_that_is_no_tensor_is_refused(tmp_path) -> None:
    class Counting(nn.Identity):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    masked = fnn.convert(nn.Sequential(nn.Linear(3, 3), Counting()), 0.5, 0.5)
    with pytest.raises(
        ValueError, match=r"model: expected a state_dict of ordinary tensors, got '1._extra_state': dict"
    ):
        fnn.save_packed(masked, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_umask_says(mask: int, tmp_path) -> None:
    masked, path = fnn.convert(nn.Linear(3, 3), 0.5, 0.5), tmp_path / "model"
    old = os.umask(mask)
    try:
        fnn.save_packed(masked, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        path.chmod(0o640)
        link = tmp_path / "link"
        link.symlink_to(path)
        fnn.save_packed(masked, link)
    finally:
        os.umask(old)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(tmp_path.iterdir()) == [link, path]
