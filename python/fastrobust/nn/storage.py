"""Masked models as small files: masks at their entropy, signs as the seed they were drawn from or one bit each.

File, all integers little-endian:
    8 bytes   magic "FRMASK" and the version, 2, as two bytes
    4 + n     length of the header, and the header: JSON, deflated
    rest      payload, the parts one after the other as the header lists them
    32 bytes  SHA-256 of everything before
The header lists the masked layers and the other tensors of the state_dict. A layer has its name, shape, kept count,
magnitude, the bytes of its mask (see `reference.binary.encode_mask`) and the seed of its signs (see `seeded_signs`), or
none, and then the signs of the kept weights follow the mask, a set bit for -1. The bytes of the tensors are grouped by
significance and compressed by LZMA.
"""

from __future__ import annotations

import copy
import hashlib
import json
import lzma
import os
import pathlib
import struct
import tempfile
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops._mask_code import decode_mask, encode_mask
from ..reference.binary import PackedWeight
from .convert import mask_layer
from .masked import MaskedLayer, masked_layers, seeded_signs

MAGIC = b"FRMASK"
VERSION = 2
_DIGEST = 32


def pack(model: nn.Module) -> dict[str, PackedWeight]:
    """The index lists of every masked layer, by name."""
    return {name: layer.packed() for name, layer in masked_layers(model).items()}


# ---- tensors ----


def _squeeze(tensors: list[Tensor]) -> bytes:
    """Bytes of equal significance side by side: signs and exponents compress, mantissas do not."""
    parts = []
    for t in tensors:
        raw = np.frombuffer(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), np.uint8)
        parts.append(raw.reshape(-1, t.element_size()).T.reshape(-1))
    data = np.concatenate(parts).tobytes() if parts else b""
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_FILTERS)


_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


def _unsqueeze(data: bytes, entries: list[dict[str, Any]]) -> dict[str, Tensor]:
    try:
        raw = lzma.decompress(data, format=lzma.FORMAT_RAW, filters=_FILTERS)
    except lzma.LZMAError as error:
        raise ValueError(f"path: expected a packed model, got one whose tensors do not unpack ({error})") from None
    out, at = {}, 0
    for entry in entries:
        dtype = getattr(torch, entry["dtype"])
        width = torch.empty((), dtype=dtype).element_size()
        size = int(np.prod(entry["shape"], dtype=np.int64))
        _require(at + size * width <= len(raw), "its tensors end early")
        part = np.frombuffer(raw, np.uint8, size * width, at).reshape(width, size).T
        out[entry["name"]] = torch.from_numpy(part.copy().reshape(-1)).view(dtype).reshape(entry["shape"])
        at += size * width
    return out


# ---- files ----


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write the masked weights and every other tensor of `model` to a small file; returns its size in bytes.

    Of a masked layer the mask, the signs and the magnitude are stored, not the scores: the file is for running the model,
    not for training it further. Signs that were drawn by the layer are stored as their seed, others (`convert` with
    signs="weights") with one bit for each kept weight. The rest of the state_dict is stored exactly. The file is complete or absent: it is written
    beside `path` and moved there.
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError("model: expected at least one masked layer, got none")
    own = {
        f"{name}.{key}" if name else key for name in layers for key in ("scores", "signs", "magnitude", "_extra_state")
    }
    others = {k: v for k, v in model.state_dict().items() if k not in own and isinstance(v, Tensor)}
    payload: list[bytes] = []
    header: dict[str, list[dict[str, Any]]] = {"layers": [], "tensors": []}
    for name, layer in layers.items():
        weight = layer.packed().to_dense(torch.int8).cpu().reshape(-1)
        mask = weight != 0
        data, seed, signs = encode_mask(mask), layer.sign_seed, b""
        if seed is None or not torch.equal(seeded_signs(seed, weight.numel())[mask], weight[mask]):
            seed, signs = None, np.packbits(weight[mask].numpy() < 0).tobytes()
        header["layers"].append(
            {
                "name": name,
                "shape": list(layer.scores.shape),
                "kept": int(mask.sum()),
                "magnitude": float(layer.magnitude),
                "bytes": len(data),
                "seed": seed,
            }
        )
        payload += [data, signs]
    names = sorted(others, key=lambda n: (n.rpartition(".")[2], n))
    payload.append(_squeeze([others[n] for n in names]))
    header["tensors"] = [
        {"name": n, "shape": list(others[n].shape), "dtype": str(others[n].dtype).removeprefix("torch.")} for n in names
    ]
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = MAGIC + struct.pack("<HI", VERSION, len(text)) + text + b"".join(payload)
    body += hashlib.sha256(body).digest()
    target = pathlib.Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
        os.replace(temporary, target)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
    return len(body)


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """A copy of `model` with the weights and tensors of a file from `save_packed`.

    model: the same architecture; a layer that the file holds masked may be masked or an ordinary Conv2d or Linear.
    The copy computes what the saved model did, bit for bit. The file is checked whole before anything is made.
    Raises ValueError for a file that is damaged, of another version or kind, or of another architecture.
    """
    header, payload = _read(pathlib.Path(path).read_bytes())
    weights, at = {}, 0
    for entry in header["layers"]:
        size, kept, seed = int(np.prod(entry["shape"], dtype=np.int64)), entry["kept"], entry["seed"]
        _require(0 <= kept <= size, "a layer keeps more weights than it has")
        split = at + entry["bytes"]
        end = split + (-(-kept // 8) if seed is None else 0)
        _require(end <= len(payload), "a layer ends early")
        mask = decode_mask(payload[at:split], size, kept)
        if seed is None:
            bits = np.unpackbits(np.frombuffer(payload[split:end], np.uint8), count=kept)
            signs = torch.zeros(size, dtype=torch.int8)
            signs[mask] = torch.from_numpy(1 - 2 * bits.astype(np.int8))
        else:
            signs = seeded_signs(seed, size)
        weights[entry["name"]] = mask.reshape(entry["shape"]), signs.reshape(entry["shape"])
        at = end
    tensors = _unsqueeze(payload[at:], header["tensors"])
    return _fill(copy.deepcopy(model), header, weights, tensors)


def _read(body: bytes) -> tuple[dict[str, Any], bytes]:
    start = len(MAGIC) + 6
    _require(len(body) >= start + _DIGEST and body.startswith(MAGIC), "no packed model at all")
    version, length = struct.unpack_from("<HI", body, len(MAGIC))
    _require(
        hashlib.sha256(body[:-_DIGEST]).digest() == body[-_DIGEST:], "one whose checksum does not match: it is damaged"
    )
    _require(version == VERSION, f"version {version}; this release reads version {VERSION}")
    try:
        header = json.loads(zlib.decompress(body[start : start + length]))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"path: expected a packed model, got one whose header does not read ({error})") from None
    return header, body[start + length : -_DIGEST]


@torch.no_grad()
def _fill(
    model: nn.Module, header: dict[str, Any], weights: dict[str, tuple[Tensor, Tensor]], tensors: dict[str, Tensor]
) -> nn.Module:
    modules = dict(model.named_modules())
    for entry in header["layers"]:
        name = entry["name"]
        old = modules.get(name)
        if not isinstance(old, (MaskedLayer, nn.Conv2d, nn.Linear)):
            raise ValueError(
                f"model: expected a convolution or linear layer {name!r}, as the file has, got {type(old).__name__}"
            )
        shape = tuple(old.scores.shape if isinstance(old, MaskedLayer) else old.weight.shape)
        if shape != tuple(entry["shape"]):
            raise ValueError(f"model: expected {name!r} of shape {tuple(entry['shape'])}, as the file has, got {shape}")
    for entry in header["layers"]:
        name = entry["name"]
        old, (mask, signs) = modules[name], weights[name]
        layer = old if isinstance(old, MaskedLayer) else mask_layer(old, entry["kept"]).to(old.weight.device)
        layer.keep = entry["kept"]
        layer.signs.copy_(signs)
        layer.sign_seed = entry["seed"]
        layer.scores.copy_(mask)
        layer.magnitude.fill_(entry["magnitude"])
        layer.absolute = False
        if layer is not old:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    state = model.state_dict()
    for name, value in tensors.items():
        if name not in state or tuple(state[name].shape) != tuple(value.shape):
            got = tuple(state[name].shape) if name in state else "none"
            raise ValueError(
                f"model: expected a tensor {name!r} of shape {tuple(value.shape)}, as the file has, got {got}"
            )
        state[name].copy_(value)
    return model


def _require(condition: bool, got: str) -> None:
    if not condition:
        raise ValueError(f"path: expected a packed model, got {got}")
