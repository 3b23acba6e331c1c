"""Sums are taken entry by entry in the order of the lists, in float32, however the rows are walked."""

from __future__ import annotations

import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastrobust as fr
from fastrobust.ops.binary import _feature_maps as fm
from feature_maps import laid, plain
from variant_runs import outputs_by_variant


def rows_of(lists: fm.Plan) -> list[list[tuple[int, float]]]:
    """Offsets and values of rows that lie side by side, sixteen to a slice."""
    assert lists.order is not None and lists.values is not None
    ptr, offsets, values = lists.ptr.tolist(), lists.offsets.tolist(), lists.values.tolist()
    rows: list[list[tuple[int, float]]] = [[] for _ in range(lists.rows)]
    for place, row in enumerate(lists.order.tolist()):
        if row < 0:
            continue
        slice_, lane = divmod(place, 16)
        entries = [16 * e + lane for e in range(ptr[slice_], ptr[slice_ + 1])]
        rows[row] = [(offsets[e], values[e]) for e in entries if values[e] != 0.0]
    return rows


def in_order(data: Tensor, source: fm.Maps, target: fm.Maps, lists: fm.Plan) -> Tensor:
    """The sums of `feature_maps.gather`, one rounded addition after the other."""
    run = ((target.height - 1) * target.pitch + target.width) * target.lanes
    out = torch.zeros(target.blocks * target.block + fm.SLACK)
    ptr, offsets = lists.ptr.tolist(), lists.offsets.tolist()
    values = None if lists.values is None else lists.values
    for block in range(source.blocks):
        for row in range(lists.rows):
            total = torch.zeros(run)
            for segment in range(lists.segments):
                first, minus, end = ptr[2 * (segment * lists.rows + row) :][:3]
                for e in range(first, end):
                    at = block * source.block + source.origin + offsets[e]
                    term = data[at : at + run]
                    term = term if values is None else term * values[e]
                    total = total + term if e < minus or values is not None else total - term
            at = block * target.block + row * target.plane + target.origin
            out[at : at + run] = total
    return out


def check(shape: tuple[int, int, int], size: tuple[int, int], batch: int, lanes: int, rate: float, real: bool) -> None:
    rows, channels, kernel = shape
    weight = (torch.randint(0, 2, (rows, channels, kernel, kernel)) * 2 - 1).float()
    weight = weight * (torch.rand(rows, 1, 1, 1) + 0.2) if real else weight
    packed = fr.ops.pack(weight * (torch.rand(weight.shape) < rate))
    geometry = fm.ConvGeometry(padding=(kernel // 2, kernel // 2))
    source = fm.input_maps(batch, channels, *size, tuple(weight.shape), geometry, lanes)
    target = fm.Maps(batch, rows, *size, lanes, source.pitch, 1, 1)
    lists = fm.plan(packed, geometry, source, False, cpu=True)
    data = laid(torch.randn(source.size), source)
    # Of one pixel of one image rows lie side by side; the order of their sums is that of all other batches.
    sums = fm.build_lists(packed, geometry, False, source.lanes, source.plane, source.pitch)
    assert torch.equal(
        plain(fm.gather(data, source, target, lists), target), plain(in_order(data, source, target, sums), target)
    )


@given(
    st.tuples(st.integers(1, 11), st.sampled_from([1, 5, 24]), st.sampled_from([1, 3])),
    st.tuples(st.integers(1, 5), st.integers(1, 6)), st.sampled_from([1, 4, 16, 17]), st.sampled_from([1, 4, 8, 16]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans(),
)  # fmt: skip
def test_rows_walked_side_by_side(shape, size, batch: int, lanes: int, rate: float, real: bool) -> None:
    check(shape, size, batch, lanes, rate, real)


@given(
    st.integers(1, 40), st.integers(1, 200), st.integers(1, 3), st.sampled_from([0.02, 0.1, 0.5, 1.0]), st.booleans()
)
def test_rows_of_one_pixel(rows: int, channels: int, batch: int, rate: float, real: bool) -> None:
    check((rows, channels, 1), (1, 1), batch, 1, rate, real)


@pytest.mark.parametrize("real", [False, True])
def test_rows_of_one_pixel_lie_side_by_side(real: bool) -> None:
    weight = torch.randn(37, 150, 1, 1) if real else torch.randint(-1, 2, (37, 150, 1, 1)).float()
    weight = weight * (torch.rand(weight.shape) < 0.3) * (torch.arange(37) % 5 > 0).view(-1, 1, 1, 1)
    packed = fr.ops.pack(weight)
    source = fm.input_maps(1, 150, 1, 1, tuple(weight.shape), fm.ConvGeometry(), 1)
    lists = fm.plan(packed, fm.ConvGeometry(), source, False, cpu=True)
    assert lists.order is not None and sorted(r for r in lists.order.tolist() if r >= 0) == list(range(37))
    for row, entries in enumerate(rows_of(lists)):
        found = torch.zeros(150)
        for offset, value in entries:
            found[offset // source.plane] += value
        assert torch.equal(found, weight[row].flatten())
    # What no row reads may be anything, also where rows have ended.
    x = torch.randn(1, 150, 1, 1)
    x[:, 0] = torch.inf
    weight[:, 0], wanted = 0.0, (weight[:, 1:, 0, 0] @ x[0, 1:, 0, 0])
    packed = fr.ops.pack(weight)
    target = fm.Maps(1, 37, 1, 1, 1, source.pitch, 0, 0)
    out = fm.gather(laid(x, source), source, target, fm.plan(packed, fm.ConvGeometry(), source, False, cpu=True))
    torch.testing.assert_close(plain(out, target)[0, :, 0, 0], wanted)


@pytest.mark.parametrize("lanes", [1, 16])
def test_segments_of_long_lists(lanes: int) -> None:
    check((7, 200, 1), (1, 1), lanes, lanes, 0.9, False)
    check((33, 200, 1), (1, 1), lanes, lanes, 0.5, True)
    check((5, 96, 1), (2, 3), lanes, lanes, 0.9, True)


def test_on_every_processor_variant() -> None:
    script = f"""
import sys, torch
import fastrobust as fr
sys.path[:0] = [{str(pathlib.Path(__file__).parents[1])!r}, {str(pathlib.Path(__file__).parent)!r}]
from test_order_of_sums import check
torch.manual_seed(4)
for rows in (1, 3, 4, 6, 9):
    for size in ((1, 1), (2, 2), (3, 4), (5, 6)):
        for lanes in (1, 4, 16):
            check((rows, 24, 3), size, lanes, lanes, 0.3, rows == 6)
    check((20 + rows, 90, 1), (1, 1), 2, 1, 0.3, rows == 6)
print("done")
"""
    assert all(words == ["done"] for words in outputs_by_variant(script).values())
