"""The store of perturbations against loops over pixels, and its contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrobust import ops
from fastrobust.reference import store as reference
from pgd_oracles import INF, assert_in_ball_and_box, same_bits

seeds = st.integers(0, 2**31)
DTYPES = (torch.float32, torch.float16)


class Problem:
    """A store, a batch of images and a move, all random."""

    def __init__(self, seed: int, factor: int = 1, padding: int = 0, dtype=torch.float32, size=(8, 12), shift=5):
        g = torch.Generator().manual_seed(seed)
        frame = [(n + 2 * padding) // factor for n in size]
        self.store = (0.2 * torch.randn(9, 2, *frame, generator=g)).to(dtype)
        self.index = torch.randperm(9, generator=g)[:5]
        self.x = torch.rand(5, 2, *size, generator=g)
        self.adv = self.x + 0.1 * torch.randn(self.x.shape, generator=g)
        self.offsets = torch.randint(-shift, shift + 1, (5, 2), generator=g)
        self.flips = torch.rand(5, generator=g) < 0.5
        self.move = {"offsets": self.offsets, "flips": self.flips, "padding": padding}


def moved_pixel(i: int, j: int, offset: Tensor, flip: bool, width: int) -> tuple[int, int]:
    """Where pixel (i, j) of the moved image comes from: shifted back, then mirrored back."""
    i, j = i - int(offset[0]), j - int(offset[1])
    return i, (width - 1 - j if flip else j)


@settings(max_examples=15)
@given(seed=seeds, height=st.integers(1, 20), width=st.integers(1, 40), shift=st.integers(0, 45))
def test_shift_flip_is_a_loop_over_pixels_and_comes_back(seed, height, width, shift) -> None:
    p = Problem(seed, size=(height, width), shift=shift)
    moved = ops.shift_flip(p.x, p.offsets, p.flips)
    want = torch.zeros_like(p.x)
    shown = torch.zeros_like(p.x)
    for b in range(5):
        for i in range(height):
            for j in range(width):
                r, c = moved_pixel(i, j, p.offsets[b], bool(p.flips[b]), width)
                if 0 <= r < height and 0 <= c < width:
                    want[b, :, i, j] = p.x[b, :, r, c]
                    shown[b, :, r, c] = 1
    assert same_bits(moved, want)
    assert torch.equal(ops.shift_flip(moved, p.offsets, p.flips, inverse=True), p.x * shown)
    for t in (p.x.double(), p.x.half(), p.x.contiguous(memory_format=torch.channels_last), torch._neg_view(-p.x)):
        again = ops.shift_flip(t, p.offsets, p.flips)
        assert again.dtype == t.dtype and torch.equal(again, want.to(t.dtype))
    assert torch.equal(ops.shift_flip(p.x, None, p.flips), torch.where(p.flips.view(-1, 1, 1, 1), p.x.flip(3), p.x))


def test_shift_flip_passes_gradients_back() -> None:
    p = Problem(1)
    x = p.x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.shift_flip(t, p.offsets, p.flips), (x,))
    x32 = p.x.clone().requires_grad_()
    weight = torch.rand(p.x.shape)
    (ops.shift_flip(x32, p.offsets, p.flips) * weight).sum().backward()
    assert torch.equal(x32.grad, ops.shift_flip(weight, p.offsets, p.flips, inverse=True))


CASES = [
    (1, 0, False),
    (1, 4, False),
    (2, 0, False),
    (2, 0, True),
    (2, 4, False),
    (2, 4, True),
    (4, 4, False),
    (4, 4, True),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "padding", "first"), CASES)
@settings(max_examples=8)
@given(seed=seeds)
def test_gather_and_scatter_are_the_reference(dtype, factor, padding, first, seed) -> None:
    p = Problem(seed, factor, padding, dtype)
    d = reference.perturbation(p.store, p.index, p.x, **p.move, augment_first=first)
    free = ops.store_gather(p.store, p.index, p.x, INF, clip=None, **p.move, augment_first=first)
    torch.testing.assert_close(free, p.x + d, rtol=0, atol=1e-6)
    got = ops.store_gather(p.store, p.index, p.x, 0.1, **p.move, augment_first=first)
    assert same_bits(got, ops.project(free, p.x, 0.1))
    want, out = p.store.clone(), p.store.clone()
    reference.scatter(want, p.index, p.adv, p.x, **p.move, augment_first=first)
    assert ops.store_scatter(out, p.index, p.adv, p.x, **p.move, augment_first=first) is out
    torch.testing.assert_close(out, want, rtol=0, atol=1e-3 if dtype == torch.float16 else 1e-6)
    others = [i for i in range(9) if i not in p.index.tolist()]
    assert torch.equal(out[others], p.store[others])


@pytest.mark.parametrize("padding", [0, 4])
@given(seed=seeds)
@settings(max_examples=10)
def test_full_resolution_is_a_loop_over_pixels(padding, seed) -> None:
    p = Problem(seed, 1, padding)
    height, width = p.x.shape[2:]
    want, start, frame = p.store.clone(), p.x.clone(), (height + 2 * padding, width + 2 * padding)
    for b, row in enumerate(p.index.tolist()):
        for i in range(height):
            for j in range(width):
                r, c = moved_pixel(i + padding, j + padding, p.offsets[b], bool(p.flips[b]), frame[1])
                if 0 <= r < frame[0] and 0 <= c < frame[1]:
                    start[b, :, i, j] = p.x[b, :, i, j] + p.store[row, :, r, c]
                    want[row, :, r, c] = p.adv[b, :, i, j] - p.x[b, :, i, j]
    got = ops.store_gather(p.store, p.index, p.x, INF, clip=None, **p.move)
    torch.testing.assert_close(got, start, rtol=0, atol=1e-7)
    assert torch.equal(ops.store_scatter(p.store, p.index, p.adv, p.x, **p.move), want)
    # written, then read: the perturbation itself wherever the frame holds it
    back = ops.store_gather(p.store, p.index, torch.zeros_like(p.x), INF, clip=None, **p.move)
    shown = back != 0
    assert torch.equal(back[shown], (p.adv - p.x)[shown]) and bool(shown.any())


def test_a_padded_store_loses_nothing() -> None:
    """A crop that moves about keeps what other crops had found: 4 pixels of padding hold every offset up to 4."""
    p = Problem(3, 1, 4, shift=4)
    for _ in range(2):
        ops.store_scatter(p.store, p.index, p.adv, p.x, **p.move)
        back = ops.store_gather(p.store, p.index, torch.zeros_like(p.x), INF, clip=None, **p.move)
        assert torch.equal(back, p.adv - p.x)
        p.offsets = -p.offsets
        p.move["offsets"] = p.offsets


def test_a_low_resolution_store_keeps_means() -> None:
    """Without a move, by hand: 2x2 means down, and constants come back as they are."""
    x = torch.zeros(1, 1, 2, 4)
    adv = torch.tensor([[[[1.0, 3.0, -2.0, 0.0], [5.0, 7.0, 1.0, 1.0]]]])
    store = torch.full((2, 1, 1, 2), 9.0)
    ops.store_scatter(store, torch.tensor([1]), adv, x)
    assert store.flatten().tolist() == [9.0, 9.0, 4.0, 0.0]
    store.fill_(0.25)
    start = ops.store_gather(store, torch.tensor([1]), x + 0.5, 1.0)
    assert torch.equal(start, torch.full_like(x, 0.75))


def test_orders_agree_on_whole_low_resolution_pixels_and_differ_else() -> None:
    p = Problem(5, 2, 0)
    p.store = p.store[:, :, :1, :1].expand_as(p.store).contiguous()  # constant images: only the zeros coming in differ
    for even in (True, False):
        offsets = torch.tensor([[2, -4]] * 5) if even else torch.tensor([[1, 3]] * 5)
        one, other = (
            ops.store_gather(p.store, p.index, p.x, INF, clip=None, offsets=offsets, augment_first=first)
            for first in (False, True)
        )
        inner = (slice(None), slice(None), slice(4, 6), slice(5, 7))
        torch.testing.assert_close(one[inner], other[inner], rtol=0, atol=1e-6)
        assert not torch.equal(one, other)  # the printed order blurs the edge of what comes in


@pytest.mark.parametrize("norm", [INF, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(seed=seeds, eps=st.floats(0.001, 0.5))
def test_ball_and_box_hold_exactly(norm, dtype, seed, eps) -> None:
    p = Problem(seed, 2, 4, dtype)
    for radius in (eps, torch.rand(5, generator=torch.Generator().manual_seed(seed))):
        for clip in ((0.0, 1.0), None, (0.0, torch.ones(2, 1, 1))):
            start = ops.store_gather(p.store, p.index, p.x, radius, norm, clip, **p.move)
            box = None if clip is None else (0.0, 1.0)
            assert_in_ball_and_box(start, p.x, radius, norm, box)


def test_float16_rounds_what_is_stored_and_never_leaves_the_ball() -> None:
    """0.3 is 0.30005 in float16: the store holds more than the radius, the start does not."""
    x = torch.zeros(1, 1, 4, 4)
    store = torch.zeros(1, 1, 4, 4, dtype=torch.float16)
    ops.store_scatter(store, torch.tensor([0]), x + 0.3, x)
    assert float(store.max()) > 0.3
    assert float(ops.store_gather(store, torch.tensor([0]), x, 0.3).double().max()) <= 0.3


def test_float16_of_every_kind_is_rounded_as_torch_does() -> None:
    values = torch.cat([torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()])
    values = values[values.isfinite()]
    up = torch.nextafter(values, torch.tensor(math.inf))
    middle = (values.double() + 0.5 * (values.double().abs() * 2**-11)).float()
    every = torch.cat([values, up, middle, torch.tensor([65519.0, 65520.0, 1e-9, -1e-9, 1e30])])
    every = torch.cat([every, every.new_zeros(-len(every) % 64)]).view(1, 1, -1, 64)
    store = torch.zeros(1, *every.shape[1:], dtype=torch.float16)
    ops.store_scatter(store, torch.tensor([0]), every, torch.zeros_like(every))
    assert torch.equal(store, every.half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_of_equal_numbers_writes(dtype) -> None:
    p = Problem(7, dtype=dtype)
    p.index = torch.tensor([4, 2, 4, 2, 4])
    want = p.store.clone()
    for b in (3, 4):
        ops.store_scatter(
            want, p.index[b : b + 1], p.adv[b : b + 1], p.x[b : b + 1], offsets=p.offsets[b : b + 1],
            flips=p.flips[b : b + 1],
        )  # fmt: skip
    got = ops.store_scatter(p.store, p.index, p.adv, p.x, **p.move)
    assert torch.equal(got, want)


def test_any_strides_and_batches_one_by_one() -> None:
    p = Problem(9, 2, 4, torch.float16)
    want = ops.store_gather(p.store, p.index, p.x, 0.2, **p.move)
    wide = torch.stack([p.store, p.store], -1)
    x = p.x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.store_gather(wide[..., 0], p.index, x, 0.2, **p.move), want)
    for b in range(5):
        one = slice(b, b + 1)
        move = {"offsets": p.offsets[one], "flips": p.flips[one], "padding": 4}
        assert torch.equal(ops.store_gather(p.store, p.index[one], p.x[one], 0.2, **move), want[one])
    ops.store_scatter(wide[..., 1], p.index, p.adv, x, **p.move)
    before = p.store.clone()
    assert torch.equal(wide[..., 0], before)
    assert torch.equal(ops.store_scatter(p.store, p.index, p.adv, p.x, **p.move), wide[..., 1])


def test_double_is_the_reference() -> None:
    p = Problem(11, 2, 4)
    x, adv = p.x.double(), p.adv.double()
    got = ops.store_gather(p.store.double(), p.index, x, 0.2, **p.move)
    torch.testing.assert_close(got.float(), ops.store_gather(p.store, p.index, p.x, 0.2, **p.move), rtol=0, atol=1e-6)
    out = ops.store_scatter(p.store.double(), p.index, adv, x, **p.move)
    torch.testing.assert_close(
        out.float(), ops.store_scatter(p.store, p.index, p.adv, p.x, **p.move), rtol=0, atol=1e-6
    )


def test_bad_input_is_refused_before_anything_is_written() -> None:
    p = Problem(13, 2, 4)
    before = p.store.clone()

    def scatter(**changed):
        given_ = {"store": p.store, "index": p.index, "adv": p.adv, "x": p.x, **p.move, **changed}
        ops.store_scatter(**given_)

    for changed, text in [
        ({"index": torch.tensor([0, 1, 2, 3, 9])}, "index: got numbers from 0 to 9, expected 0 to 8"),
        ({"index": torch.tensor([-1, 1, 2, 3, 4])}, "index: got numbers from -1"),
        ({"index": torch.arange(4)}, "index: got"),
        ({"index": torch.rand(5)}, "index: got"),
        ({"offsets": torch.zeros(5, 3, dtype=torch.int64)}, "offsets: got"),
        ({"flips": torch.zeros(5)}, "flips: got"),
        ({"padding": -1}, "padding: got -1"),
        ({"padding": 3}, "store: got rows of 8x10"),
        ({"store": p.store.bfloat16()}, "store: got"),
        ({"store": p.store[:, :1]}, "store: got shape"),
        ({"adv": p.adv[:4]}, "adv: got shape"),
        ({"x": p.x[0]}, "x: got shape"),
        ({"store": torch.zeros(9, 2, 9, 11), "padding": 5, "augment_first": True}, "augment_first: got"),
    ]:
        with pytest.raises((ValueError, TypeError), match=text):
            scatter(**changed)
    assert torch.equal(p.store, before)
    for bad, text in [({"eps": -0.1}, "eps: got"), ({"norm": 3}, "norm: got"), ({"clip": (1.0, 0.0)}, "clip: got")]:
        with pytest.raises((ValueError, TypeError), match=text):
            ops.store_gather(p.store, p.index, p.x, **{"eps": 0.1, **bad}, **p.move)
    with pytest.raises(ValueError, match="x: got"):
        ops.shift_flip(p.x[0], p.offsets)


def test_opcheck_and_versions() -> None:
    p = Problem(15, 2, 4)
    registry = torch.ops.fastrobust
    x = p.x.clone().requires_grad_()
    torch.library.opcheck(registry.shift_flip.default, (x, p.offsets, p.flips, False))
    move = (p.offsets, p.flips)
    torch.library.opcheck(registry.store_gather.default, (p.store, p.index, x, *move, None, 0.1, 0.0, 1.0, 4, False))
    torch.library.opcheck(registry.store_scatter.default, (p.index, p.adv, p.x, *move, 4, False, p.store))
    version = p.store._version
    ops.store_scatter(p.store, p.index, p.adv, p.x, **p.move)
    assert p.store._version > version


def test_empty_batches_and_images() -> None:
    store, index = torch.zeros(3, 2, 4, 4), torch.zeros(0, dtype=torch.int64)
    x = torch.zeros(0, 2, 4, 4)
    assert ops.store_gather(store, index, x, 0.1).shape == x.shape
    assert torch.equal(ops.store_scatter(store, index, x, x), torch.zeros(3, 2, 4, 4))
    assert ops.shift_flip(x, None).shape == x.shape


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "padding", "first"), CASES)
def test_cuda_gives_the_same_bits(dtype, factor, padding, first) -> None:
    p = Problem(17, factor, padding, dtype)
    p.index = torch.tensor([4, 2, 4, 7, 0])
    move = {"padding": padding, "augment_first": first}
    on = {"offsets": p.offsets.cuda(), "flips": p.flips.cuda()}
    got = ops.store_gather(p.store.cuda(), p.index, p.x.cuda(), 0.1, **on, **move)
    assert same_bits(got.cpu(), ops.store_gather(p.store, p.index, p.x, 0.1, offsets=p.offsets, flips=p.flips, **move))
    out = ops.store_scatter(p.store.cuda(), p.index, p.adv.cuda(), p.x.cuda(), **on, **move)
    want = ops.store_scatter(p.store, p.index, p.adv, p.x, offsets=p.offsets, flips=p.flips, **move)
    assert same_bits(out.cpu().float(), want.float())
    moved = ops.shift_flip(p.x.cuda(), p.offsets, p.flips)
    assert same_bits(moved.cpu(), ops.shift_flip(p.x, p.offsets, p.flips))
