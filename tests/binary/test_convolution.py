"""Masked convolutions against torch's dense ones with the masked weight."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastrobust as fr
from convolution_problems import Weights, close, problems, problems_of_equal_width, real, signs
from fastrobust.ops.binary import convolution as ops
from fastrobust.ops.binary import masks
from fastrobust.reference import binary as reference
from variant_runs import outputs_by_variant


@pytest.mark.parametrize("path", ["sparse", "lanes", "plain", "auto", "dense"])
@pytest.mark.parametrize("weights", [signs, real])
@given(problem=st.one_of(problems(), problems_of_equal_width()))
def test_forward_and_gradients_equal_dense(path: str, weights: Weights, problem: dict) -> None:
    os.environ["FASTROBUST_BINARY"] = path
    try:
        _check(weights, **problem)
    finally:
        del os.environ["FASTROBUST_BINARY"]


def _check(
    weights: Weights, batch, size, shape, density, stride, padding, dilation, groups, channels_last, seed
) -> None:
    torch.manual_seed(seed)
    w = weights(shape, density)
    largest = 3 if weights is real else 1  # a term against one of signs
    x = torch.randn(batch, shape[1] * groups, *size)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact = F.conv2d(exact_x, w.double(), None, stride, padding, dilation, groups)
    k = shape[0]
    bias, scale, shift, residual = (torch.randn(k), torch.randn(k), torch.randn(k), torch.randn(exact.shape))
    packed = fr.ops.pack(w)
    assert weights is signs or (packed.values is None) == (packed.kept == 0)
    terms = largest * int((w != 0).flatten(1).sum(1).max()) if w.numel() else 0

    plain = fr.ops.masked_conv2d(x, packed, None, stride, padding, dilation, groups)
    close(plain, exact, terms)
    grad = torch.randn(exact.shape)
    (ours,) = torch.autograd.grad(plain, x, grad)
    (truth,) = torch.autograd.grad(exact, exact_x, grad.double())
    close(ours, truth, largest * int((w != 0).sum()))

    fused = fr.ops.masked_conv2d(
        x, packed, bias, stride, padding, dilation, groups, scale=scale, shift=shift, residual=residual, relu=True
    )
    want = reference.epilogue(exact, *(t.double() for t in (bias, scale, shift, residual)), relu=True)
    close(fused, want, terms)


@pytest.mark.parametrize("weights", [signs, real])
@given(problem=problems_of_equal_width())
def test_plain_maps_and_lanes_give_the_same_bits(weights: Weights, problem: dict) -> None:
    """Both sparse kernels add in the order of the lists, so that the result does not depend on which a batch takes."""
    p = problem
    torch.manual_seed(p["seed"])
    packed = fr.ops.pack(weights(p["shape"], p["density"]))
    x = torch.randn(p["batch"], p["shape"][1] * p["groups"], *p["size"])
    g = ops.ConvGeometry.of(p["stride"], p["padding"], p["dilation"], p["groups"])
    results = []
    for path in ("plain", "lanes"):
        os.environ["FASTROBUST_BINARY"] = path
        try:
            assert (ops.path_of(packed, p["batch"], *p["size"], g).lanes == 0) == (path == "plain")
            given = x.clone().requires_grad_()
            y = fr.ops.masked_conv2d(given, packed, None, p["stride"], p["padding"], p["dilation"], p["groups"])
            residual, scale = torch.ones_like(y).cumsum(0), torch.arange(p["shape"][0]).float()
            with torch.no_grad():
                z = fr.ops.masked_conv2d(
                    x, packed, scale, p["stride"], p["padding"], p["dilation"], p["groups"],
                    scale=scale, residual=residual, relu=True,
                )  # fmt: skip
            (grad,) = torch.autograd.grad(y, given, y.detach())
            results.append((y.detach(), z, grad))
        finally:
            del os.environ["FASTROBUST_BINARY"]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 16])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_linear(batch: int, density: float) -> None:
    w = signs((7, 37), density)
    x = torch.randn(batch, 2, 37, requires_grad=True)
    bias, residual = torch.randn(7, requires_grad=True), torch.randn(batch, 2, 7)
    y = fr.ops.masked_linear(x, fr.ops.pack(w), bias, residual=residual, relu=True)
    x2, bias2 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    want = (F.linear(x2, w.double(), bias2) + residual).relu()
    close(y, want, 37)
    grad = torch.randn_like(y)
    for ours, truth in zip(
        torch.autograd.grad(y, (x, bias), grad), torch.autograd.grad(want, (x2, bias2), grad.double()), strict=True
    ):
        close(ours, truth, 37)


def test_epilogue_gradients() -> None:
    w = signs((6, 4, 3, 3), 0.3)
    packed = fr.ops.pack(w)
    given = {
        "bias": torch.randn(6),
        "scale": torch.randn(6),
        "shift": torch.randn(6),
        "residual": torch.randn(2, 6, 5, 5),
    }
    for fixed_scale in (False, True):
        ours = {n: t.clone().requires_grad_(not (fixed_scale and n == "scale")) for n, t in given.items()}
        truth = {n: t.double().clone().requires_grad_() for n, t in given.items()}
        x = torch.randn(2, 4, 5, 5)
        y = fr.ops.masked_conv2d(x, packed, padding=1, relu=True, **ours)
        want = reference.epilogue(F.conv2d(x.double(), w.double(), padding=1), relu=True, **truth)
        grad = torch.randn_like(y)
        y.backward(grad)
        want.backward(grad.double())
        for name, t in ours.items():
            if t.requires_grad:
                close(t.grad, truth[name].grad, 200)


def test_gradcheck_and_second_order() -> None:
    packed = fr.ops.pack(signs((4, 3, 3, 2), 0.4))
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return fr.ops.masked_conv2d(x, packed, stride=2, padding=1)

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


def test_opcheck() -> None:
    packed = fr.ops.pack(signs((4, 3, 3, 3), 0.4))
    lists = (packed.ptr, packed.index, packed.values, packed.shape, (2, 1), (1, 1), (1, 1), 1)
    x = torch.randn(5, 3, 6, 5, requires_grad=True)
    shift, residual = torch.randn(4, requires_grad=True), torch.randn(5, 4, 3, 5, requires_grad=True)
    for extra in ((None, None, None, False), (torch.randn(4), shift, residual, True)):
        torch.library.opcheck(torch.ops.fastrobust.masked_conv2d.default, (x, *lists, *extra))
    grad = torch.randn(5, 4, 3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.fastrobust.masked_conv2d_input_grad.default, (grad, *lists, 6, 5))
    torch.library.opcheck(torch.ops.fastrobust.topk_mask.default, (torch.randn(50), 7))


def test_compiles_in_one_graph() -> None:
    packed = fr.ops.pack(signs((8, 4, 3, 3), 0.2))
    x = torch.randn(3, 4, 9, 9)

    def f(x: Tensor) -> Tensor:
        return fr.ops.masked_conv2d(x, packed, padding=1, relu=True).sum()

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


def test_works_in_inference_mode_and_on_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    w = signs((8, 4, 3, 3), 0.2)
    packed = fr.ops.pack(w)
    x = torch.randn(6, 9, 8, 11)[::2, 1:8:2, :, 1:-1].flip(2)
    with torch.inference_mode():
        close(fr.ops.masked_conv2d(x, packed), F.conv2d(x.double(), w.double()), 40)
    z = torch.randn(2, 4, 6, 6, dtype=torch.complex64)
    negative = torch._neg_view(z.real.contiguous())
    close(fr.ops.masked_conv2d(negative, packed), F.conv2d(-z.real.double(), w.double()), 40)


@pytest.mark.parametrize("batch", [5, 16, 23])
@pytest.mark.parametrize("path", ["sparse", "plain", "lanes"])
def test_an_image_does_not_depend_on_its_batch(batch: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    packed = fr.ops.pack(signs((20, 24, 3, 3), 0.4))
    x = torch.randn(batch, 24, 7, 6)
    whole = fr.ops.masked_conv2d(x, packed, padding=1)
    for n in range(batch):
        assert torch.equal(fr.ops.masked_conv2d(x[n : n + 1], packed, padding=1)[0], whole[n])


@pytest.mark.parametrize(
    "size", [(4, 4), (7, 7), (8, 8), (5, 8), (6, 8), (7, 8), (14, 14), (16, 16), (48, 16), (32, 32)]
)
@pytest.mark.parametrize("density", [0.05, 0.6])
@pytest.mark.parametrize("path", ["lanes", "plain"])
def test_map_sizes_with_tiles_of_their_own(size: tuple[int, int], density: float, path: str, monkeypatch) -> None:
    """Whole-row tiles, one and several segments, with everything in the epilogue."""
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    w = signs((36, 40, 3, 3), density)
    packed = fr.ops.pack(w)
    x, residual = torch.randn(16, 40, *size), torch.randn(16, 36, *size)
    scale, shift = torch.randn(36), torch.randn(36)
    y = fr.ops.masked_conv2d(x, packed, padding=1, scale=scale, shift=shift, residual=residual, relu=True)
    want = reference.epilogue(F.conv2d(x.double(), w.double(), padding=1), None, scale, shift, residual, True)
    close(y, want, 360)
    assert torch.equal(
        fr.ops.masked_conv2d(x[:1], packed, padding=1, scale=scale, shift=shift, residual=residual[:1], relu=True),
        y[:1],
    )


@pytest.mark.parametrize("path", ["plain", "lanes"])
def test_threads_do_not_change_the_result(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    packed = fr.ops.pack(signs((64, 48, 3, 3), 0.3))
    x = torch.randn(9, 48, 17, 16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fr.ops.masked_conv2d(x, packed, padding=1)
        torch.set_num_threads(2)
        assert torch.equal(fr.ops.masked_conv2d(x, packed, padding=1), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", ["plain", "lanes"])
@pytest.mark.parametrize("size", [4, 7, 8])
def test_nan_stays_in_its_own_image(path: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    w = signs((8, 8, 3, 3), 0.3)
    packed = fr.ops.pack(w)
    x = torch.randn(6, 8, size, size)
    clean = fr.ops.masked_conv2d(x, packed, padding=1)
    x[2] = float("nan")
    bad = fr.ops.masked_conv2d(x, packed, padding=1, relu=True)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(bad[others], clean[others].relu())
    rows = (w != 0).flatten(1).any(1)
    assert bad[2, rows][:, 1:-1, 1:-1].isnan().any()


VARIANT_SCRIPT = """
import hashlib, torch, fastrobust as fr
torch.manual_seed(5)
digest = hashlib.sha256()
for batch, shape, size, stride in ((1, (9, 7, 3, 3), 13, 1), (16, (33, 40, 3, 3), 8, 2), (5, (6, 4, 5, 5), 9, 3), (7, (6, 40, 3, 3), 5, 1)):
    w = (torch.randint(0, 2, shape) * 2 - 1).float() * (torch.rand(shape) < 0.3)
    x = torch.randn(batch, shape[1], size, size, requires_grad=True)
    y = fr.ops.masked_conv2d(x, fr.ops.pack(w), stride=stride, padding=1, scale=torch.randn(shape[0]), relu=True)
    y.backward(torch.randn_like(y))
    for t in (y.detach(), x.grad, fr.ops.topk_mask(x.detach(), x.numel() // 3)):
        digest.update(t.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("path", ["lanes", "plain"])
def test_every_cpu_variant_gives_the_same_bits(path: str) -> None:
    results = outputs_by_variant(VARIANT_SCRIPT, FASTROBUST_BINARY=path)
    assert all(len(words) == 1 and len(words[0]) == 64 for words in results.values())
    assert len({words[0] for words in results.values()}) == 1, results


def test_pack_equals_the_reference() -> None:
    for shape in ((5, 3, 3, 3), (4, 70), (1, 1, 1, 1), (3, 0), (0, 4)):
        w = signs(shape, 0.3)
        ours, want = fr.ops.pack(w), reference.pack(w) if w.numel() else None
        assert torch.equal(ours.to_dense(), w)
        if want is not None:
            assert torch.equal(ours.ptr, want.ptr) and torch.equal(ours.index, want.index)
            assert ours.density == pytest.approx(float((w != 0).float().mean()))


def test_packing_where_the_weight_is_equals_packing_on_the_host() -> None:
    w = signs((5, 4, 3, 3), 0.3)
    there, here = masks._pack_there(w), fr.ops.pack(w)
    assert there.shape == here.shape and torch.equal(there.ptr, here.ptr) and torch.equal(there.index, here.index)
    for bad in ("inf", "nan"):
        w[1, 2, 0, 0] = float(bad)
        with pytest.raises(ValueError, match=f"weight: expected entries that are finite in float32, got {bad}"):
            masks._pack_there(w)


def test_an_empty_layer_gives_zeros_and_zero_gradients() -> None:
    x = torch.randn(3, 4, 6, 6, requires_grad=True)
    y = fr.ops.masked_conv2d(x, fr.ops.pack(torch.zeros(5, 4, 3, 3)), padding=1)
    y.sum().backward()
    assert not y.any() and not x.grad.any()


def test_path_follows_the_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = fr.ops.pack(signs((64, 64, 3, 3), 0.01))
    dense = fr.ops.pack(signs((64, 64, 3, 3), 1.0))
    g = ops.ConvGeometry.of(1, 1)
    assert ops.path_of(sparse, 16, 32, 32, g).path == "sparse"
    choice = ops.path_of(dense, 16, 32, 32, g)
    assert choice.path == "dense" and choice.dense < choice.sparse
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    assert ops.path_of(dense, 16, 32, 32, g).path == "sparse"
    monkeypatch.setenv("FASTROBUST_BINARY", "fast")
    with pytest.raises(ValueError, match="FASTROBUST_BINARY.*'fast'"):
        ops.path_of(dense, 16, 32, 32, g)


@pytest.mark.parametrize("path", ["lanes", "plain", "auto", "dense"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape, stride, groups, density", [((64, 3, 3, 3), 1, 1, 1.0), ((12, 3, 1, 1), 2, 2, 0.4)])
def test_calls_that_are_known_by_heart(path, channels_last, shape, stride, groups, density, monkeypatch) -> None:
    """The second call of a kind takes a shorter way: the same values, formats and gradients, whatever came before."""
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    w = signs(shape, density)
    packed = fr.ops.pack(w)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, shape[1] * groups, 16, 16).contiguous(memory_format=layout)
    exact = x.double().requires_grad_()
    want = F.conv2d(exact, w.double(), None, stride, 1, 1, groups)
    grad = torch.randn_like(want)
    (want_grad,) = torch.autograd.grad(want, exact, grad)
    with torch.inference_mode():
        for _ in range(2):
            close(fr.ops.masked_conv2d(x, packed, None, stride, 1, 1, groups), want, 27)
    for _ in range(2):
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = fr.ops.masked_conv2d(given, packed, None, stride, 1, 1, groups)
        close(y, want, 27)
        assert y.is_contiguous(memory_format=layout)
        close(torch.autograd.grad(y, given, grad.float())[0], want_grad, 9 * shape[0])
        with torch.no_grad():
            z = fr.ops.masked_conv2d(given, packed, None, stride, 1, 1, groups)
        close(z, want, 27)
        assert not z.requires_grad and z.is_contiguous(memory_format=layout)
    with pytest.raises(TypeError, match="stride: expected an int or two"):
        fr.ops.masked_conv2d(x, packed, None, True if stride == 1 else 2.0, 1, 1, groups)
    monkeypatch.setenv("FASTROBUST_BINARY", "fast")
    with pytest.raises(ValueError, match="FASTROBUST_BINARY.*'fast'"):
        fr.ops.masked_conv2d(x, packed, None, stride, 1, 1, groups)


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))])
def test_lists_that_were_used_can_be_copied(path: str, again, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    packed = fr.ops.pack(signs((6, 4, 3, 3), 0.4))
    x = torch.randn(2, 4, 7, 7).contiguous(memory_format=torch.channels_last)
    want = fr.ops.masked_conv2d(x, packed)
    assert torch.equal(fr.ops.masked_conv2d(x, again(packed)), want)


def test_the_input_gradient_has_a_path_of_its_own() -> None:
    """torch computes input gradients for multiples of sixteen channels, which the three of an image are not."""
    first = fr.ops.pack(signs((64, 3, 3, 3), 1.0))
    g = ops.ConvGeometry.of(1, 1)
    assert [ops.path_of(first, 16, 32, 32, g, transposed).path for transposed in (False, True)] == ["dense", "sparse"]


BAD = [
    ({"x": torch.zeros(2, 3, 5, 5)}, ValueError, r"x: expected \(N, 4, H, W\), got \(2, 3, 5, 5\)"),
    ({"x": torch.zeros(4, 5, 5)}, ValueError, "x: expected"),
    ({"x": torch.zeros(2, 4, 2, 2)}, ValueError, "x: expected maps at least as large as the kernel"),
    ({"x": torch.zeros(2, 4, 5, 5, dtype=torch.int32)}, TypeError, "x: expected float32"),
    ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    ({"packed": torch.zeros(6, 4, 3, 3)}, TypeError, "packed: expected the result of"),
    ({"packed": fr.ops.pack(torch.zeros(6, 4))}, ValueError, "packed: expected a weight"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias: expected \(6,\), got \(5,\)"),
    ({"scale": torch.zeros(6, dtype=torch.float64)}, TypeError, "scale: expected torch.float32"),
    ({"residual": torch.zeros(2, 6, 5, 5)}, ValueError, r"residual: expected \(2, 6, 3, 3\)"),
    ({"stride": 0}, ValueError, "stride: expected"),
    ({"stride": 1.5}, TypeError, "stride: expected"),
    ({"padding": -1}, ValueError, "padding: expected"),
    ({"dilation": (1, 1, 1)}, ValueError, "dilation: expected"),
    ({"groups": 0}, ValueError, "groups: expected at least 1, got 0"),
    ({"groups": 4, "x": torch.zeros(2, 16, 5, 5)}, ValueError, "groups: expected a divisor of the 6"),
]


@pytest.mark.parametrize("change, error, text", BAD, ids=[f"{i}-{b[2][:20]}" for i, b in enumerate(BAD)])
def test_bad_input(change: dict, error: type[Exception], text: str) -> None:
    args = {"x": torch.zeros(2, 4, 5, 5), "packed": fr.ops.pack(torch.zeros(6, 4, 3, 3)), **change}
    with pytest.raises(error, match=text):
        fr.ops.masked_conv2d(**args)


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"weight: expected entries that are finite in float32, got inf"):
        fr.ops.pack(torch.tensor([[1.0, 1e300]], dtype=torch.float64))
    with pytest.raises(ValueError, match="got nan"):
        fr.ops.pack(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="weight: expected"):
        fr.ops.pack(torch.zeros(3))
    with pytest.raises(TypeError, match="weight: expected real"):
        fr.ops.pack(torch.zeros(3, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"x: expected \(..., 4\)"):
        fr.ops.masked_linear(torch.zeros(2, 3), fr.ops.pack(torch.zeros(6, 4)))


@pytest.mark.parametrize("broken", ["index", "ptr", "length", "dtype"])
def test_lists_made_by_hand_are_checked(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    good = fr.ops.pack(signs((6, 4, 3, 3), 0.5))
    ptr, index = good.ptr.clone(), good.index.clone()
    if broken == "index":
        index[3] = 36
    elif broken == "ptr":
        ptr[3] = ptr[-1] + 5
    elif broken == "length":
        ptr = ptr[:-1]
    else:
        index = index.long()
    with pytest.raises(ValueError, match="packed: expected index lists of a weight"):
        fr.ops.masked_conv2d(torch.zeros(1, 4, 5, 5), reference.PackedWeight(good.shape, ptr, index))


@pytest.mark.cuda
@given(problem=problems())
def test_cuda_equals_cpu(problem: dict) -> None:
    os.environ["FASTROBUST_BINARY"] = "sparse"
    try:
        p = dict(problem)
        torch.manual_seed(p["seed"])
        w = signs(p["shape"], p["density"])
        x = torch.randn(p["batch"], p["shape"][1] * p["groups"], *p["size"])
        args = (None, p["stride"], p["padding"], p["dilation"], p["groups"])
        packed = fr.ops.pack(w)
        gpu = packed.to("cuda")
        on_cpu, on_gpu = x.clone().requires_grad_(), x.cuda().requires_grad_()
        ours, want = fr.ops.masked_conv2d(on_gpu, gpu, *args), fr.ops.masked_conv2d(on_cpu, packed, *args)
        assert torch.equal(ours.cpu(), want)
        grad = torch.randn(want.shape)
        ours.backward(grad.cuda())
        want.backward(grad)
        assert torch.equal(on_gpu.grad.cpu(), on_cpu.grad)
    finally:
        del os.environ["FASTROBUST_BINARY"]
