"""The header of packed files: what it lists, written as JSON and read back with every value checked.

A checksum is no signature, so a header may say anything. Nothing is made of what it says before all of it has been
found to be of the right types, in range and consistent.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from typing import Any

import torch

# Index lists of a layer are int32.
_MOST_WEIGHTS = 1 << 31
_MOST_FLOAT = float(torch.finfo(torch.float32).max)
_DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64",
        "complex128",
    )
}  # fmt: skip


def require(condition: bool, got: str) -> None:
    if not condition:
        raise ValueError(f"path: expected a packed model, got {got}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_storable(value: Any) -> bool:
    """An ordinary tensor, whose bytes are all there is to it."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and dtype_name(value.dtype) in _DTYPES


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """A masked layer: the bytes of its mask, and the seed of its signs; None where those of the kept ones follow, or,
    of type `values`, the kept weights themselves."""

    name: str
    shape: tuple[int, ...]
    kept: int
    magnitude: float
    bytes: int
    seed: int | None
    values: torch.dtype | None = None

    @property
    def stored(self) -> int:
        """Bytes of the payload."""
        if self.values is not None:
            return self.bytes + self.kept * self.values.itemsize
        return self.bytes + (-(-self.kept // 8) if self.seed is None else 0)


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Header:
    layers: tuple[LayerEntry, ...]
    tensors: tuple[TensorEntry, ...]

    def encode(self) -> bytes:
        tensors = [{**dataclasses.asdict(t), "dtype": dtype_name(t.dtype)} for t in self.tensors]
        names = [None if layer.values is None else dtype_name(layer.values) for layer in self.layers]
        layers = [{**dataclasses.asdict(layer), "values": name} for layer, name in zip(self.layers, names, strict=True)]
        return json.dumps({"layers": layers, "tensors": tensors}, separators=(",", ":"), allow_nan=False).encode()

    @staticmethod
    def decode(text: bytes, version: int) -> Header:
        """Version 2 has no layers with values."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"path: expected a packed model, got one whose header does not read ({error})") from None
        lists = _fields(given, "its header", "layers", "tensors")
        require(all(type(entries) is list for entries in lists), "one whose header has no lists of layers and tensors")
        header = Header(tuple(_layer(entry, version) for entry in lists[0]), tuple(map(_tensor, lists[1])))
        names = [entry.name for entry in header.layers] + [entry.name for entry in header.tensors]
        require(len(names) == len(set(names)), "one that lists a name twice")
        require(bool(header.layers), "one without masked layers")
        return header


def _layer(given: Any, version: int) -> LayerEntry:
    fields = ("name", "shape", "kept", "magnitude", "bytes", "seed", *(("values",) if version > 2 else ()))
    name, shape, kept, magnitude, size, seed, *rest = _fields(given, "a layer", *fields)
    values = rest[0] if rest else None
    _check_name(name)
    dims = _shape(shape, name)
    weights = math.prod(dims)
    require(len(dims) in (2, 4) and weights < _MOST_WEIGHTS, f"a layer {name!r} of shape {_short(shape)}")
    require(_is_int(kept) and 0 <= kept <= weights, f"a layer {name!r} that keeps {_short(kept)} of {weights} weights")
    number = _is_int(magnitude) or type(magnitude) is float
    require(number and -_MOST_FLOAT <= magnitude <= _MOST_FLOAT, f"a layer {name!r} of magnitude {_short(magnitude)}")
    # A code takes log2(n choose k) < n bits and a byte or two.
    require(_is_int(size) and 0 <= size <= weights // 8 + 16, f"a mask {name!r} of {_short(size)} bytes")
    # Seeds are keys of a Philox generator.
    good = seed is None or _is_int(seed) and 0 <= seed < 1 << 128
    require(good, f"a layer {name!r} with signs from {_short(seed)}")
    good = values is None or type(values) is str and values in ("float32", "float64") and seed is None
    require(good, f"a layer {name!r} with weights of type {_short(values)}")
    return LayerEntry(name, dims, kept, float(magnitude), size, seed, None if values is None else _DTYPES[values])


def _tensor(given: Any) -> TensorEntry:
    name, shape, dtype = _fields(given, "a tensor", "name", "shape", "dtype")
    _check_name(name)
    require(type(dtype) is str and dtype in _DTYPES, f"a tensor {name!r} of type {_short(dtype)}")
    entry = TensorEntry(name, _shape(shape, name), _DTYPES[dtype])
    require(entry.bytes < 1 << 63, f"a tensor {name!r} of shape {_short(shape)}")
    return entry


def _fields(given: Any, what: str, *names: str) -> list[Any]:
    """The values of a JSON object that has these names and no others."""
    require(type(given) is dict and given.keys() == set(names), f"one in which {what} is {_short(given)}")
    return [given[name] for name in names]


def _check_name(name: Any) -> None:
    require(type(name) is str and len(name) <= 1000, f"one with a name {_short(name)}")


def _shape(given: Any, name: str) -> tuple[int, ...]:
    good = type(given) is list and len(given) <= 64 and all(_is_int(n) and 0 <= n < 1 << 63 for n in given)
    require(good, f"{name!r} of shape {_short(given)}")
    return tuple(given)


def _is_int(value: Any) -> bool:
    return type(value) is int


def _short(value: Any) -> str:
    return reprlib.repr(value)
