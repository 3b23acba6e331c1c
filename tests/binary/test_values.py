"""Masked convolutions whose kept weights are any numbers: lists with values."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import fastrobust as fr
from convolution_problems import close, problems, real, signs
from fastrobust.ops.binary import _conv_cost as cost
from fastrobust.ops.binary import _feature_maps as fm
from fastrobust.ops.binary import convolution as ops
from fastrobust.ops.binary import masks
from fastrobust.reference import binary as reference
from variant_runs import outputs_by_variant


@pytest.mark.parametrize("path", ["lanes", "plain"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_terms_are_added_in_the_order_of_the_weight(path: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product is rounded, then the sum, whatever the map and the batch: so two rows of few terms are known
    exactly."""
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    w, x = real((6, 5, 1, 1), 1.0), torch.randn(batch, 5, 4, 4)
    want = torch.zeros(batch, 6, 4, 4)
    for c in range(5):
        want = want + x[:, c : c + 1] * w[:, c].reshape(1, 6, 1, 1)
    assert torch.equal(fr.ops.masked_conv2d(x, fr.ops.pack(w)), want)


def test_values_that_are_signs_times_a_power_of_two_round_as_signs_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one sign, the order of the lists is the same: a quarter of the weight gives a quarter of the result."""
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    w = signs((20, 24, 3, 3), 0.4).abs()
    for batch, size in ((1, 9), (16, 8), (5, 13)):
        x = torch.randn(batch, 24, size, size)
        quarter, whole = (fr.ops.masked_conv2d(x, fr.ops.pack(v), padding=1) for v in (w / 4, w))
        assert torch.equal(quarter, whole / 4)


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 70), (1, 1, 1, 1), (37, 33)])
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_pack_equals_the_reference(shape: tuple[int, ...], density: float) -> None:
    w = real(shape, density)
    for ours in (fr.ops.pack(w), masks._pack_there(w), fr.ops.pack(w.flip(0).flip(0).contiguous())):
        want = reference.pack(w)
        assert torch.equal(ours.to_dense(), w) and ours.shape == shape
        assert torch.equal(ours.ptr, want.ptr) and torch.equal(ours.index, want.index)
        assert (ours.values is None) == (want.values is None)
        if ours.values is not None:
            assert torch.equal(ours.values, want.values) and torch.equal(ours.ptr[1::2], ours.ptr[2::2])
            assert ours.values.dtype == torch.float32


def test_weights_of_signs_have_no_values() -> None:
    w = signs((5, 4, 3, 3), 0.5)
    assert fr.ops.pack(w).values is fr.ops.pack(w.double()).values is fr.ops.pack(w.char()).values is None
    w[2, 1, 0, 0] = 1 + 2**-23
    packed = fr.ops.pack(w)
    assert packed.values is not None and torch.equal(packed.to_dense(), w)
    assert fr.ops.pack(-torch.zeros(3, 4)).kept == 0


def test_types_of_weights() -> None:
    exact = torch.randn(5, 7, dtype=torch.float64)
    packed = fr.ops.pack(exact)
    assert packed.values.dtype == torch.float64 and torch.equal(packed.to_dense(torch.float64), exact)
    assert torch.equal(fr.ops.pack(exact.half()).to_dense(), exact.half().float())
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.allclose(fr.ops.masked_linear(x, packed), x @ exact.t(), rtol=1e-14, atol=1e-14)
    close(fr.ops.masked_linear(x.float(), packed), x.float().double() @ exact.t(), 21)
    assert not fr.ops.pack(torch.randn(3, 4, requires_grad=True)).values.requires_grad
    integers = fr.ops.pack(torch.tensor([[3, 0, -2]]))
    assert integers.values.tolist() == [3, -2] and integers.index.tolist() == [0, 2]


def test_lists_of_one_mask_with_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept with lists belongs to their values too."""
    x = torch.randn(2, 4, 7, 7)
    one = fr.ops.pack(real((6, 4, 3, 3), 0.4))
    other = dataclasses.replace(one, values=-2 * one.values)
    plain = dataclasses.replace(one, values=None)  # all are added
    negated = dataclasses.replace(one, values=torch._neg_view(one.values))
    for path in ("lanes", "plain", "dense"):
        monkeypatch.setenv("FASTROBUST_BINARY", path)
        for packed in (one, other, plain, negated):
            close(fr.ops.masked_conv2d(x, packed), F.conv2d(x.double(), packed.to_dense(torch.float64)), 60)


@pytest.mark.parametrize("broken", ["length", "dtype", "infinite", "stride", "minus"])
def test_lists_made_by_hand_are_checked(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    good = fr.ops.pack(real((6, 4, 3, 3), 0.5))
    ptr, values = good.ptr.clone(), good.values.clone()
    if broken == "length":
        values = values[:-1]
    elif broken == "dtype":
        values = values.half()
    elif broken == "infinite":
        values[2] = torch.inf
    elif broken == "stride":
        values = values.repeat_interleave(2)[::2]
    else:
        ptr[3] -= 1
    with pytest.raises(ValueError, match="packed: expected index lists of a weight"):
        fr.ops.masked_conv2d(torch.zeros(1, 4, 5, 5), dataclasses.replace(good, ptr=ptr, values=values))


def test_gradcheck_and_second_order() -> None:
    packed = fr.ops.pack(real((4, 3, 3, 2), 0.4).double() / 3)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return fr.ops.masked_conv2d(x, packed, stride=2, padding=1)

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


def test_second_derivatives_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    w = real((4, 3, 3, 3), 0.6)
    packed = fr.ops.pack(w)
    first, second = [], []
    for x, f in (
        (torch.linspace(-1, 1, 150).reshape(2, 3, 5, 5), lambda t: fr.ops.masked_conv2d(t, packed, padding=1)),
        (torch.linspace(-1, 1, 150).reshape(2, 3, 5, 5).double(), lambda t: F.conv2d(t, w.double(), padding=1)),
    ):
        x.requires_grad_()
        (grad,) = torch.autograd.grad((f(x) ** 3).sum(), x, create_graph=True)
        first.append(grad)
        second.append(torch.autograd.grad((grad**2).sum(), x)[0])
    for ours, truth in (first, second):
        assert float((ours.double() - truth).detach().abs().max()) <= 1e-5 * float(truth.detach().abs().max())


def test_opcheck() -> None:
    packed = fr.ops.pack(real((4, 3, 3, 3), 0.4))
    lists = (packed.ptr, packed.index, packed.values, packed.shape, (2, 1), (1, 1), (1, 1), 1)
    x = torch.randn(5, 3, 6, 5, requires_grad=True)
    shift, residual = torch.randn(4, requires_grad=True), torch.randn(5, 4, 3, 5, requires_grad=True)
    for extra in ((None, None, None, False), (torch.randn(4), shift, residual, True)):
        torch.library.opcheck(torch.ops.fastrobust.masked_conv2d.default, (x, *lists, *extra))
    grad = torch.randn(5, 4, 3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fastrobust.masked_conv2d_input_grad.default, (grad, *lists, 6, 5))


def test_compiles_and_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    w = real((8, 4, 3, 3), 0.2)
    packed = fr.ops.pack(w)
    x = torch.randn(3, 4, 9, 9)

    def f(x: Tensor) -> Tensor:
        return fr.ops.masked_conv2d(x, packed, padding=1, relu=True).sum()

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
    exact = x.double().requires_grad_()
    F.conv2d(exact, w.double(), padding=1).relu().sum().backward()
    close(torch.func.grad(f)(x), exact.grad, 200)
    close(torch.vmap(lambda t: fr.ops.masked_conv2d(t[None], packed)[0])(x), F.conv2d(exact, w.double()), 100)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), lambda p: p.to("cpu"), lambda p: p]
)
def test_lists_that_were_used_can_be_copied(path: str, again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    w = real((6, 4, 3, 3), 0.4)
    packed = fr.ops.pack(w)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 4, 7, 7).contiguous(memory_format=layout)
        want = F.conv2d(x.double(), w.double(), padding=1)
        for _ in range(2):  # the second call of a kind takes a shorter way
            y = fr.ops.masked_conv2d(x, packed, padding=1)
            close(y, want, 60)
            assert y.is_contiguous(memory_format=layout)
            assert torch.equal(fr.ops.masked_conv2d(x, again(packed), padding=1), y)


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("density", [0.05, 1.0])
def test_linear(batch: int, density: float) -> None:
    w = real((7, 37), density)
    x = torch.randn(batch, 2, 37, requires_grad=True)
    y = fr.ops.masked_linear(x, fr.ops.pack(w), relu=True)
    exact = x.detach().double().requires_grad_()
    want = F.linear(exact, w.double()).relu()
    close(y, want, 111)
    grad = torch.randn_like(y)
    close(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(want, exact, grad.double())[0], 111)


@pytest.mark.parametrize("path", ["plain", "lanes"])
def test_nan_stays_in_its_own_image(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    packed = fr.ops.pack(real((8, 8, 3, 3), 0.3))
    x = torch.randn(6, 8, 7, 7)
    clean = fr.ops.masked_conv2d(x, packed, padding=1)
    x[2] = torch.inf
    bad = fr.ops.masked_conv2d(x, packed, padding=1)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(bad[others], clean[others])
    assert not bad[2, :, 1:-1, 1:-1].isfinite().all()


def test_an_image_depends_neither_on_its_batch_nor_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = fr.ops.pack(real((20, 24, 3, 3), 0.4))
    x = torch.randn(23, 24, 7, 6)
    threads = torch.get_num_threads()
    for path in ("plain", "lanes"):
        monkeypatch.setenv("FASTROBUST_BINARY", path)
        whole = fr.ops.masked_conv2d(x, packed, padding=1)
        try:
            torch.set_num_threads(2)
            assert torch.equal(fr.ops.masked_conv2d(x, packed, padding=1), whole)
        finally:
            torch.set_num_threads(threads)
        for n in range(0, 23, 4):
            assert torch.equal(fr.ops.masked_conv2d(x[n : n + 1], packed, padding=1)[0], whole[n])


VARIANT_SCRIPT = """
import hashlib, torch, fastrobust as fr
torch.manual_seed(6)
digest = hashlib.sha256()
for batch, shape, size, stride in ((1, (9, 7, 3, 3), 13, 1), (16, (33, 40, 3, 3), 8, 2), (5, (6, 4, 5, 5), 9, 3), (7, (6, 40, 3, 3), 5, 1)):
    w = torch.randn(shape) * (torch.rand(shape) < 0.3)
    x = torch.randn(batch, shape[1], size, size, requires_grad=True)
    packed = fr.ops.pack(w)
    y = fr.ops.masked_conv2d(x, packed, stride=stride, padding=1, relu=True)
    y.backward(torch.randn_like(y))
    for t in (y.detach(), x.grad, packed.values, packed.index):
        digest.update(t.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("path", ["lanes", "plain"])
def test_every_cpu_variant_gives_the_same_bits(path: str) -> None:
    results = outputs_by_variant(VARIANT_SCRIPT, FASTROBUST_BINARY=path)
    assert all(len(words) == 1 and len(words[0]) == 64 for words in results.values())
    assert len({words[0] for words in results.values()}) == 1, results


def test_values_cost_more_than_signs() -> None:
    g = ops.ConvGeometry.of(1, 1)
    shape = (64, 64, 3, 3)
    signed, valued = (cost.choose(16, 32, 32, shape, g, 3686, None, False, True, v) for v in (False, True))
    assert valued.sparse > signed.sparse and valued.dense == signed.dense
    w = signs(shape, 0.1)
    for packed in (fr.ops.pack(w), fr.ops.pack(w * 0.3)):
        want = cost.choose(16, 32, 32, shape, g, packed.kept, None, False, True, packed.values is not None)
        assert ops.path_of(packed, 16, 32, 32, g) == want
    inside = [cost.estimate(16, 32, 32, shape, g, 3686, 16, v).sparse for v in (False, True)]
    assert inside[1] > inside[0]


@pytest.mark.cuda
@given(problem=problems())
def test_cuda_equals_cpu(problem: dict) -> None:
    p = problem
    torch.manual_seed(p["seed"])
    packed = fr.ops.pack(real(p["shape"], p["density"]))
    gpu = packed.to("cuda")
    x = torch.randn(p["batch"], p["shape"][1] * p["groups"], *p["size"])
    args = (None, p["stride"], p["padding"], p["dilation"], p["groups"])
    os.environ["FASTROBUST_BINARY"] = "sparse"
    try:
        on_cpu, on_gpu = x.clone().requires_grad_(), x.cuda().requires_grad_()
        ours, want = fr.ops.masked_conv2d(on_gpu, gpu, *args), fr.ops.masked_conv2d(on_cpu, packed, *args)
        assert torch.equal(ours.cpu(), want)
        grad = torch.randn(want.shape)
        ours.backward(grad.cuda())
        want.backward(grad)
        assert torch.equal(on_gpu.grad.cpu(), on_cpu.grad)
        there = fr.ops.pack(packed.to_dense().cuda())
        assert torch.equal(there.index.cpu(), packed.index) and (there.values is None) == (packed.values is None)
    finally:
        del os.environ["FASTROBUST_BINARY"]


def test_plans_hold_the_values_by_entry() -> None:
    """In segments the entries have another order than in the weight, and their values go with them."""
    w = real((8, 64, 3, 3), 0.9)
    packed = fr.ops.pack(w)
    maps = fm.input_maps(1, 64, 5, 5, w.shape, ops.ConvGeometry.of(1, 1), 1)
    lists = fm.plan(packed, ops.ConvGeometry.of(1, 1), maps, False)
    assert lists.segments > 1
    assert torch.equal(lists.values.sort().values, packed.values.sort().values)
    assert not torch.equal(lists.values, packed.values)
