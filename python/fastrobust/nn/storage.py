"""Masked models as small files: masks at their entropy, signs as the seed they were drawn from or one bit each.

File, all numbers little-endian:
    8 bytes   magic "FRMASK" and the version, 3, as two bytes; files of version 2, which have no values, are read too
    4 + n     length of the header, and the header: JSON, deflated
    rest      payload, the parts one after the other as the header lists them
    32 bytes  SHA-256 of everything before
The header lists the masked layers and the other tensors of the state_dict. A layer has its name, shape, kept count,
magnitude, the bytes of its mask (see `reference.binary.encode_mask`) and the seed of its signs (see `seeded_signs`), or
none, and then the signs of the kept weights follow the mask, a set bit for -1; weights that are no signs follow
themselves instead, as `values` of the type that the header says. The bytes of the tensors are grouped by
significance and compressed by LZMA.
"""

from __future__ import annotations

import copy
import hashlib
import lzma
import os
import pathlib
import secrets
import struct
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.binary._mask_code import decode_mask, encode_mask
from ..reference.binary import PackedWeight
from ._packed_header import Header, LayerEntry, TensorEntry, dtype_name, is_storable, require
from .convert import mask_layer, replace_layers
from .masked import MaskedLayer, masked_layers, seeded_signs

MAGIC = b"FRMASK"
VERSION = 3
_READ = (2, 3)
_DIGEST = 32
# What a file may hold beyond the weights of the model it is loaded into: its header.
_HEADER_BYTES = 1 << 20
# State of a masked layer that its mask and signs stand for.
_OWN = ("scores", "signs", "magnitude", "_extra_state")


def pack(model: nn.Module) -> dict[str, PackedWeight]:
    """The index lists of every masked layer, by name."""
    return {name: layer.packed() for name, layer in masked_layers(model).items()}


# ---- tensors ----

_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]


def _squeeze(tensors: list[Tensor]) -> bytes:
    """Bytes of equal significance side by side: signs and exponents compress, mantissas do not."""
    parts = []
    for t in tensors:
        raw = np.frombuffer(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), np.uint8)
        parts.append(raw.reshape(-1, t.element_size()).T.reshape(-1))
    data = np.concatenate(parts).tobytes() if parts else b""
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_FILTERS)


def _unsqueeze(data: memoryview, entries: tuple[TensorEntry, ...]) -> dict[str, Tensor]:
    """The tensors, unpacked to the size the header says and not a byte further."""
    size = sum(e.bytes for e in entries)
    # Nothing can repeat what lies further back than the start, so the window need not be larger.
    window = {"dict_size": min(64 << 20, max(4096, size))}
    unpacking = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=[{**_FILTERS[0], **window}])
    try:
        raw = unpacking.decompress(bytes(data), max_length=size + 1)
    except lzma.LZMAError as error:
        raise ValueError(f"path: expected a packed model, got one whose tensors do not unpack ({error})") from None
    require(len(raw) >= size, "one whose tensors end early")
    require(len(raw) == size, f"one whose tensors are more than the {size} bytes its header lists")
    if not unpacking.eof and not unpacking.needs_input:
        require(not unpacking.decompress(b"", max_length=1), "one whose tensors do not end")
    require(unpacking.eof and not unpacking.unused_data, "one that does not end where its tensors end")
    out, at = {}, 0
    for entry in entries:
        part = np.frombuffer(raw, np.uint8, entry.bytes, at).reshape(entry.dtype.itemsize, -1).T
        require(
            entry.dtype != torch.bool or not part.size or part.max() <= 1,
            f"a bool tensor {entry.name!r} of other bytes",
        )
        out[entry.name] = torch.from_numpy(part.copy().reshape(-1)).view(entry.dtype).reshape(entry.shape)
        at += entry.bytes
    return out


# ---- saving ----


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Write the masked weights and every other tensor of `model` to a small file; returns its size in bytes.

    Of a masked layer the mask, the signs and the magnitude are stored, not the scores: the file is for running the
    model, not for training it further. Signs that were drawn by the layer are stored as their seed, others (`convert`
    with signs="weights") with one bit for each kept weight; kept weights that are no signs (init="given") with all of
    their bits. The rest of the state_dict is stored exactly. The file is
    complete or absent: it is written beside `path` and moved there; its mode is that of the file it replaces or what
    umask says. Raises ValueError when there is no masked layer, or for state that is no ordinary tensor.
    """
    layers = masked_layers(model)
    if not layers:
        raise ValueError("model: expected at least one masked layer, got none")
    others = _others(model)
    for name, t in others.items():
        if not is_storable(t):
            what = f"{t.layout} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"model: expected a state_dict of ordinary tensors, got {name!r}: {what}")
    payload: list[bytes] = []
    entries: list[LayerEntry] = []
    for name, layer in layers.items():
        packed = layer.packed().to("cpu")
        values = None if packed.values is None else packed.values.dtype
        weight = packed.to_dense(torch.int8 if values is None else values).reshape(-1)
        mask = weight != 0
        data, seed, kept = encode_mask(mask), layer.sign_seed, weight[mask]
        if values is not None:
            seed, stored = None, kept.numpy().astype(_little(values)).tobytes()
        elif seed is None or not torch.equal(seeded_signs(seed, weight.numel())[mask], kept):
            seed, stored = None, np.packbits(kept.numpy() < 0).tobytes()
        else:
            stored = b""
        shape = tuple(layer.scores.shape)
        entries.append(LayerEntry(name, shape, len(kept), float(layer.magnitude), len(data), seed, values))
        payload += [data, stored]
    names = sorted(others, key=lambda n: (n.rpartition(".")[2], n))
    payload.append(_squeeze([others[n] for n in names]))
    tensors = tuple(TensorEntry(n, tuple(others[n].shape), others[n].dtype) for n in names)
    text = zlib.compress(Header(tuple(entries), tensors).encode(), 9)
    body = MAGIC + struct.pack("<HI", VERSION, len(text)) + text + b"".join(payload)
    body += hashlib.sha256(body).digest()
    _write(pathlib.Path(path), body)
    return len(body)


def _little(dtype: torch.dtype) -> str:
    return f"<f{dtype.itemsize}"


def _others(model: nn.Module) -> dict[str, Any]:
    """The state_dict without what masked layers store in their own way, under whatever name they are held."""
    own: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MaskedLayer):
            own.update(f"{name}.{key}" if name else key for key in _OWN)
    return {name: value for name, value in model.state_dict().items() if name not in own}


def _write(path: pathlib.Path, body: bytes) -> None:
    target = pathlib.Path(os.path.realpath(path))  # a link stays one
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}")
    # Created by open itself, whose mode umask decides.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- loading ----


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """A copy of `model` with the weights and tensors of a file from `save_packed`.

    model: the same architecture; a layer that the file holds masked may be masked or an ordinary Conv2d or Linear.
    The copy computes what the saved model did, bit for bit: its state is the file's, nothing missing, nothing left
    over. The file is checked whole, and against the model, before anything of the size it says is made.
    Raises ValueError for a file that is damaged, forged, of another version or kind, or of another architecture. The
    checksum tells damage, not who wrote the file.
    """
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    most = 4 * _HEADER_BYTES + 2 * held
    with open(path, "rb") as file:
        body = file.read(most + 1)
    require(len(body) <= most, f"one larger than {most} bytes, the most that this model can take")
    header, payload = _read(body)
    del body
    model = copy.deepcopy(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in header.layers:
        _match_layer(layer, modules.get(layer.name))
    stored = sum(layer.stored for layer in header.layers)
    require(stored <= len(payload), "one whose layers end early")
    _match_tensors(header, model, modules)
    tensors = _unsqueeze(payload[stored:], header.tensors)
    _match_rest(header, model)
    new: dict[nn.Module, nn.Module] = {}
    at = 0
    for layer in header.layers:
        old = modules[layer.name]
        masked = old if isinstance(old, MaskedLayer) else mask_layer(old, layer.kept, name=layer.name)
        _fill(masked, layer, payload[at : at + layer.stored])
        at += layer.stored
        new[old] = masked
    model = replace_layers(model, new)
    state = model.state_dict()
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)
    return model


def _read(body: bytes) -> tuple[Header, memoryview]:
    start = len(MAGIC) + 6
    require(len(body) >= start + _DIGEST and body.startswith(MAGIC), "no packed model at all")
    version, length = struct.unpack_from("<HI", body, len(MAGIC))
    view = memoryview(body)
    require(
        hashlib.sha256(view[:-_DIGEST]).digest() == body[-_DIGEST:], "one whose checksum does not match: it is damaged"
    )
    require(version in _READ, f"version {version}; this release reads versions {_READ[0]} to {_READ[-1]}")
    require(start + length + _DIGEST <= len(body), "one whose header ends early")
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(view[start : start + length], _HEADER_BYTES)
    except zlib.error as error:
        raise ValueError(f"path: expected a packed model, got one whose header does not read ({error})") from None
    require(unpacking.eof and not unpacking.unused_data, f"one whose header does not end within {_HEADER_BYTES} bytes")
    return Header.decode(text, version), view[start + length : -_DIGEST]


def _match_layer(entry: LayerEntry, module: nn.Module | None) -> None:
    if not isinstance(module, (MaskedLayer, nn.Conv2d, nn.Linear)):
        got = "none" if module is None else type(module).__name__
        raise ValueError(f"model: expected a convolution or linear layer {entry.name!r}, as the file has, got {got}")
    own = module.scores if isinstance(module, MaskedLayer) else module.weight
    if tuple(own.shape) != entry.shape:
        raise ValueError(
            f"model: expected {entry.name!r} of shape {entry.shape}, as the file has, got {tuple(own.shape)}"
        )
    if entry.values not in (None, own.dtype):
        raise ValueError(f"model: expected {entry.name!r} of type {entry.values}, as the file has, got {own.dtype}")


def _match_tensors(header: Header, model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Every tensor of the file has its place in the model, of its shape and type."""
    state = _expected(header, model)
    for entry in header.tensors:
        value = state.get(entry.name)
        found = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None
        if found != (entry.shape, entry.dtype):
            got = "none" if found is None else f"{found[0]} {dtype_name(found[1])}"
            wanted = f"{entry.shape} {dtype_name(entry.dtype)}"
            raise ValueError(f"model: expected a tensor {entry.name!r} of shape {wanted}, as the file has, got {got}")


def _match_rest(header: Header, model: nn.Module) -> None:
    missing = _expected(header, model).keys() - {entry.name for entry in header.tensors}
    if missing:
        raise ValueError(f"model: got {', '.join(map(repr, sorted(missing)))}, expected nothing that the file lacks")


def _expected(header: Header, model: nn.Module) -> dict[str, Any]:
    """The state that the file has to hold as tensors: all but the weights that it holds as masks."""
    modules = dict(model.named_modules(remove_duplicate=False))
    masked = {id(modules[entry.name]) for entry in header.layers}
    state = model.state_dict()
    for name, module in modules.items():
        if id(module) in masked:
            for key in (*_OWN, *(() if isinstance(module, MaskedLayer) else ("weight",))):
                state.pop(f"{name}.{key}" if name else key, None)
    return state


@torch.no_grad()
def _fill(layer: MaskedLayer, entry: LayerEntry, data: memoryview) -> None:
    size = layer.scores.numel()
    mask = decode_mask(bytes(data[: entry.bytes]), size, entry.kept)
    signs: Tensor
    if entry.values is not None:
        raw = np.frombuffer(data[entry.bytes :], _little(entry.values))
        kept = torch.from_numpy(raw.astype(raw.dtype.newbyteorder("=")))
        good = bool((kept.float().isfinite() & (kept != 0)).all())
        require(good, f"a layer {entry.name!r} that keeps weights of zero, or not finite in float32")
        signs = torch.zeros(size, dtype=entry.values)
        signs[mask] = kept
    elif entry.seed is None:
        bits = np.unpackbits(np.frombuffer(data[entry.bytes :], np.uint8), count=entry.kept)
        signs = torch.zeros(size, dtype=torch.int8)
        signs[mask] = torch.from_numpy(1 - 2 * bits.astype(np.int8))
    else:
        signs = seeded_signs(entry.seed, size)
    layer.keep, layer.absolute = entry.kept, False
    layer.fix_weight(signs.reshape(entry.shape))
    layer.sign_seed = entry.seed
    layer.scores.copy_(mask.reshape(entry.shape))
    layer.magnitude.fill_(entry.magnitude)
