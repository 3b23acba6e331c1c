"""On a GPU: the same results as on the CPU, streams, graph capture, other devices, large tensors, and a build without
CUDA."""

from __future__ import annotations

import pytest
import torch

import fastrobust
from fastrobust import ops
from pgd_oracles import INF, NORMS, assert_in_ball_and_box, images, same_bits

SHAPES = ((1,), (5,), (16,), (3, 7, 9), (3, 32, 32), (8193,), (3, 224, 224))


def check(got: torch.Tensor, want: torch.Tensor, norm: float) -> None:
    assert got.is_cuda
    if norm == INF:
        assert same_bits(got.cpu(), want)
    else:
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=3e-6)


def to(device: str, *values):
    return [v.to(device) if isinstance(v, torch.Tensor) else v for v in values]


@pytest.mark.cuda
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_steps_equal_the_cpus(norm, shape, dtype) -> None:
    x, x0, grad = images(1, 4, shape)
    grad = grad.to(dtype)
    active, v = torch.tensor([True, False, True, True]), torch.rand(4)
    kinds = [(0.1, 0.3), (torch.rand(4), torch.rand(4))] + (
        [(torch.rand(x.shape), torch.rand(x.shape))] if norm == INF else []
    )
    for step, eps in kinds:
        for mask in (None, active):
            args, device_args = (x, x0, grad, step, eps), to("cuda", x, x0, grad, step, eps)
            device_mask = None if mask is None else mask.cuda()
            got = ops.pgd_step(*device_args, norm, active=device_mask)
            check(got, ops.pgd_step(*args, norm, active=mask), norm)
            if mask is None:
                assert_in_ball_and_box(got.cpu(), x0, eps, norm, (0, 1))
            out = torch.empty_like(device_args[0])
            assert ops.pgd_step(*device_args, norm, active=device_mask, out=out) is out and same_bits(out, got)
            fused, want = (
                ops.pgd_step_fosc(*device_args, 0.5, norm, active=device_mask),
                ops.pgd_step_fosc(*args, 0.5, norm, active=mask),
            )
            check(fused[0], want[0], norm)
            torch.testing.assert_close(fused[1].cpu(), want[1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(
            ops.fosc(*device_args[:3], device_args[4], norm).cpu(),
            ops.fosc(x, x0, grad, eps, norm),
            rtol=1e-5,
            atol=1e-4,
        )
        check(ops.project(*device_args[:2], device_args[4], norm), ops.project(x, x0, eps, norm), norm)
    for variant in ("paper", "authors"):
        got = ops.atas_step(*to("cuda", x, x0, grad, v), 0.05, 0.3, norm, variant=variant, active=active.cuda())
        want = ops.atas_step(x, x0, grad, v, 0.05, 0.3, norm, variant=variant, active=active)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=3e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_start_draws_the_same_numbers(norm, shape) -> None:
    _, x0, _ = images(2, 3, shape)
    got = ops.random_start(x0.cuda(), 0.3, norm, seed=2**64 - 1, first_example=5)
    want = ops.random_start(x0, 0.3, norm, seed=2**64 - 1, first_example=5)
    check(got, want, norm)
    assert_in_ball_and_box(got.cpu(), x0, 0.3, norm, (0, 1))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["cross_entropy", "margin_loss", "dlr_loss", "dlr_targeted_loss", "kl_divergence"])
@pytest.mark.parametrize("classes", [4, 10, 33, 1000])
def test_losses_equal_the_cpus(name, classes) -> None:
    logits, labels, targets = 3 * torch.randn(9, classes), *torch.randint(0, classes, (2, 9))
    others = {"kl_divergence": (torch.randn(9, classes),), "dlr_targeted_loss": (labels, targets)}.get(name, (labels,))
    z = logits.cuda().requires_grad_()
    got, want = getattr(ops, name)(z, *to("cuda", *others)), getattr(ops, name)(logits, *others)
    torch.testing.assert_close(got.value.cpu(), want.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.grad.cpu(), want.grad, rtol=1e-5, atol=1e-6)
    got.value.sum().backward()
    torch.testing.assert_close(z.grad, got.grad)


@pytest.mark.cuda
@pytest.mark.parametrize("norm", NORMS)
def test_work_is_queued_on_the_current_stream(norm) -> None:
    """The inputs are written late on a side stream: an op on another stream would read them too early."""
    x, x0, grad = (t.cuda() for t in images(3, 16, (3, 64, 64)))
    want = ops.pgd_step(x, x0, grad, 0.1, 0.3, norm)
    late = torch.zeros_like(grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(grad)
        got = ops.pgd_step(x, x0, late, 0.1, 0.3, norm)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(got, want)


@pytest.mark.cuda
@pytest.mark.parametrize("norm", NORMS)
def test_capture_in_a_cuda_graph(norm) -> None:
    x, x0, grad = (t.cuda() for t in images(4, 4, (3, 32, 32)))
    v, out, logits = torch.rand(4, device="cuda"), torch.empty_like(x), torch.randn(4, 10, device="cuda")
    labels = torch.randint(0, 10, (4,), device="cuda")

    def work():
        ops.pgd_step(x, x0, grad, 0.1, 0.3, norm, out=out)
        return (
            *ops.pgd_step_fosc(x, x0, grad, 0.1, 0.3, 0.5, norm), *ops.atas_step(x, x0, grad, v, 0.1, 0.3, norm),
            ops.random_start(x0, 0.3, norm, seed=3), *ops.cross_entropy(logits, labels), ops.project(x, x0, 0.3, norm),
        )  # fmt: skip

    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for seed in (5, 6):
        for t, fresh in zip((x, x0, grad), images(seed, 4, (3, 32, 32)), strict=True):
            t.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.clone() for t in (out, *captured)]
        eager = work()
        for a, b in zip(replayed, (out, *eager), strict=True):
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("norm", NORMS)
def test_device_that_is_not_current(norm) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, x0, grad = images(5, 4, (3, 16, 16))
    other = [t.to("cuda:1") for t in (x, x0, grad)]
    with torch.cuda.device(0):
        got = ops.pgd_step(*other, 0.1, 0.3, norm)
        assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    check(got, ops.pgd_step(x, x0, grad, 0.1, 0.3, norm), norm)
    with pytest.raises(ValueError, match="^x0: got device cuda:0, expected x's device cuda:1"):
        ops.pgd_step(other[0], x0.to("cuda:0"), other[2], 0.1, 0.3, norm)


@pytest.mark.cuda
def test_more_elements_than_32_bits_count() -> None:
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 5 * 4 * n:
        pytest.skip("needs 43 GB of free device memory")
    x0 = torch.full((1, n), 0.5, device="cuda")
    grad = torch.ones(1, n, device="cuda", dtype=torch.bfloat16)
    grad[0, -3:] = -1
    y = ops.pgd_step(x0, x0, grad, 0.25, 0.5)
    assert (y[0, :-3] == 0.75).all() and (y[0, -3:] == 0.25).all()
    ops.pgd_step(x0, x0, grad, 0.25, 1.0, norm=2, out=y)
    size = (y - x0).double().norm().item() if torch.cuda.mem_get_info()[0] > 12 * n else None
    assert size is None or size <= 1.0


@pytest.mark.cuda
def test_many_examples() -> None:
    """More rows than a grid's y dimension holds."""
    x, x0, grad = images(6, 70_001, (5,))
    active = torch.rand(70_001) < 0.5
    for norm in NORMS:
        got = ops.pgd_step(*to("cuda", x, x0, grad), 0.1, 0.3, norm, active=active.cuda())
        check(got, ops.pgd_step(x, x0, grad, 0.1, 0.3, norm, active=active), norm)
        check(ops.random_start(x0.cuda(), 0.3, norm, seed=1), ops.random_start(x0, 0.3, norm, seed=1), norm)


@pytest.mark.cuda
def test_tensors_on_different_devices_are_refused() -> None:
    x, x0, grad = images(7, 3, (5,))
    for name, arguments in (("x0", (x.cuda(), x0, grad.cuda())), ("grad", (x.cuda(), x0.cuda(), grad))):
        with pytest.raises(ValueError, match=f"^{name}: got device cpu, expected x's device cuda:0"):
            ops.pgd_step(*arguments, 0.1, 0.3)
    with pytest.raises(ValueError, match="^eps: got device cpu"):
        ops.pgd_step(x.cuda(), x0.cuda(), grad.cuda(), 0.1, torch.rand(3))


@pytest.mark.skipif(bool(fastrobust.build_info()["cuda_toolkit"]), reason="this build has CUDA kernels")
def test_build_without_cuda_says_so() -> None:
    from fastrobust.ops import _library

    with pytest.raises(RuntimeError, match="built without CUDA kernels.*reinstall where nvcc is on PATH"):
        _library.require_cuda_build(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="built without CUDA kernels"):
        fastrobust._C.pgd_random_start(0, 0, 0, 0, 0, 1, 0, (0, 0.1, 0), 0.0, 1.0, 0, 0, 0, 0)
    assert fastrobust.build_info()["devices"] == []
