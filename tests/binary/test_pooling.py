"""Max pooling in the fast layout and its gradient, against torch's on plain tensors."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from fastrobust.nn._schedule import ARENA, Buffer, Schedule
from fastrobust.ops.binary import _feature_maps as fm
from feature_maps import beside_pixels, pooled
from variant_runs import outputs_by_variant

WINDOWS = [
    (2, 2, 2, 2, 0, 0, 1, 1), (3, 3, 2, 2, 1, 1, 1, 1), (3, 3, 1, 1, 1, 1, 1, 1), (3, 2, 3, 1, 1, 1, 1, 1),
    (1, 5, 2, 4, 0, 2, 1, 1), (2, 3, 1, 2, 0, 0, 2, 3), (4, 4, 4, 4, 0, 0, 1, 1), (3, 3, 2, 3, 0, 1, 1, 2),
    (2, 2, 3, 3, 1, 0, 1, 1),
]  # fmt: skip


def out_size(size: int, dim: int, window: tuple[int, ...]) -> int:
    kernel, stride, pad, dilation = window[dim::2]
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def values(kind: str, size: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(size)
    if kind == "ties":
        x = x.round()
    elif kind == "missing":
        x[torch.rand(size) < 0.1] = torch.nan
        x[torch.rand(size) < 0.3] = -torch.inf
    return x


maps_sizes = st.tuples(st.sampled_from([1, 3, 7, 16, 17]), st.integers(1, 3), st.integers(1, 12), st.integers(1, 40))


@given(
    maps_sizes, st.sampled_from(WINDOWS), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 2), st.integers(0, 2),
    st.sampled_from(["plain", "ties", "missing"]),
)  # fmt: skip
def test_pooling_is_torchs(size, window, lanes: int, border: int, out_border: int, kind: str) -> None:
    n, c, h, w = size
    out_h, out_w = (out_size(s, dim, window) for dim, s in enumerate((h, w)))
    assume(out_h > 0 and out_w > 0)
    kh, kw, sh, sw, ph, pw, dh, dw = window
    source = fm.Maps(n, c, h, w, lanes, w + border, border, border)
    target = fm.Maps(n, c, out_h, out_w, lanes, out_w + out_border, out_border, out_border)
    x = values(kind, size).requires_grad_()
    # A window of padding alone has no pixel to be the largest.
    inside = F.max_pool2d(torch.ones(1, 1, h, w), (kh, kw), (sh, sw), (ph, pw), (dh, dw))
    assume(inside.isfinite().all())
    want, index = F.max_pool2d(x, (kh, kw), (sh, sw), (ph, pw), (dh, dw), return_indices=True)
    grad = torch.randn(want.shape)
    (want_grad,) = torch.autograd.grad(want, x, grad)
    got, number, got_grad = pooled(x.detach(), grad, source, target, window)
    assert torch.equal(got.nan_to_num(9), want.nan_to_num(9))
    y, x_at = index // w, index % w
    top, left = torch.arange(out_h).view(-1, 1) * sh - ph, torch.arange(out_w) * sw - pw
    assert torch.equal(number, (y - top) // dh * kw + (x_at - left) // dw)
    assert torch.equal(got_grad, want_grad)


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_windows_that_reach_over_the_end(lanes: int) -> None:
    """As torch's ceil_mode has them, and of which some have no pixel at all."""
    x = torch.randn(3, 2, 7, 8)
    want = F.max_pool2d(x, 3, 2, ceil_mode=True)
    source, target = fm.Maps(3, 2, 7, 8, lanes, 8, 0, 0), fm.Maps(3, 2, 3, 4, lanes, 4, 0, 0)
    got, _, _ = pooled(x, torch.ones(want.shape), source, target, (3, 3, 2, 2, 0, 0, 1, 1))
    assert torch.equal(got, want)
    empty = fm.Maps(3, 2, 5, 6, lanes, 6, 0, 0)
    got, _, dx = pooled(x, torch.ones(empty.size), source, empty, (2, 2, 2, 2, 0, 0, 1, 1))
    assert torch.equal(got[..., :3, :4], F.max_pool2d(x, 2)[..., :3, :4])
    assert (got[..., 4:, :] == -torch.inf).all() and (got[..., 4:] == -torch.inf).all()
    assert dx.sum() == 3 * 2 * 4 * 4
    # Padding wider than the window.
    wide = fm.Maps(3, 2, 6, 7, lanes, 8, 1, 1)
    got, _, dx = pooled(x, torch.ones(wide.size), source, wide, (2, 2, 2, 2, 3, 3, 1, 1))
    want = F.max_pool2d(F.pad(x, (3, 3, 3, 3), value=-torch.inf), 2)
    assert torch.equal(got, want)
    assert dx.sum() == want.isfinite().sum()


@pytest.mark.parametrize("threads", [1, 2])
def test_in_a_schedule_the_arena_is_used_again(threads: int) -> None:
    """Steps whose results lie where others lay: borders are zeros whatever was there."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        size, window = (5, 3, 9, 9), (3, 3, 2, 2, 1, 1, 1, 1)
        x = torch.randn(size)
        source, target = fm.Maps(*size, 4, 11, 1, 2), fm.Maps(5, 3, 5, 5, 4, 11, 1, 2)
        s = Schedule()
        given = [s.given(shape=size, strides=x.stride()) for _ in range(2)]
        for _ in range(2):
            laid = s.copy(given[0], Buffer(ARENA, source))
            out, where = s.max_pool(laid, target, window, True)
            assert where is not None
            dx = s.max_pool_grad(out, where, source, window)
            s.copy(dx, given[1])
        compiled = s.compile([out, dx])
        leaf = x.clone().requires_grad_()
        y = F.max_pool2d(leaf, 3, 2, 1)
        (want,) = torch.autograd.grad(y, leaf, y.detach())
        for _ in range(3):
            got = torch.empty(size)
            state = compiled.run([x, got])
            assert torch.equal(got, want)
            for buffer, maps in ((out, target), (dx, source)):
                assert not beside_pixels(buffer.view(state.tensors), maps).any()
            state.tensors[0].masked_fill_(state.tensors[0] != 0, 3.0)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_named() -> None:
    one, four = fm.Maps(2, 1, 4, 4, 1, 4, 0, 0), fm.Maps(2, 1, 2, 2, 4, 2, 0, 0)
    with pytest.raises(ValueError, match="got layouts of 1 and 4 lanes, expected equally many"):
        pooled(torch.ones(one.size), torch.ones(four.size), one, four, (2, 2, 2, 2, 0, 0, 1, 1))
    half = fm.Maps(2, 1, 2, 2, 1, 2, 0, 0)
    with pytest.raises(ValueError, match="got a window of 2 x 0, expected positive sizes"):
        pooled(torch.ones(one.size), torch.ones(half.size), one, half, (2, 0, 2, 2, 0, 0, 1, 1))
    with pytest.raises(ValueError, match="at most 255 pixels where a gradient is wanted"):
        pooled(torch.ones(one.size), torch.ones(half.size), one, half, (16, 16, 2, 2, 8, 8, 1, 1))
    other = fm.Maps(2, 3, 2, 2, 1, 2, 0, 0)
    with pytest.raises(ValueError, match="expected the same images and channels"):
        pooled(torch.ones(one.size), torch.ones(other.size), one, other, (2, 2, 2, 2, 0, 0, 1, 1))


def test_every_processor_variant_gives_the_same_bits() -> None:
    script = f"""
import hashlib, sys, torch
import fastrobust as fr
sys.path[:0] = [{str(pathlib.Path(__file__).parents[1])!r}, {str(pathlib.Path(__file__).parent)!r}]
from feature_maps import pooled
from test_pooling import WINDOWS, out_size, values
from fastrobust.ops.binary import _feature_maps as fm
torch.manual_seed(2)
for window in WINDOWS:
    for lanes in (1, 2, 4, 8, 16):
        size = (7, 2, 9, 37)
        out = tuple(out_size(s, dim, window) for dim, s in enumerate(size[2:]))
        maps = fm.Maps(*size, lanes, 38, 1, 1), fm.Maps(7, 2, *out, lanes, out[1] + 1, 1, 1)
        found = pooled(values("ties", size), torch.randn(7, 2, *out), *maps, window)
        print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest())
"""
    (first, *others) = outputs_by_variant(script).values()
    assert len(first) == 5 * len(WINDOWS)
    assert all(other == first for other in others)
