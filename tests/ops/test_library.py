"""The ops as torch sees them: opcheck, compile, fake tensors, modes, transforms, autograd's version counter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastrobust import ops
from pgd_oracles import INF, NORMS, images, same_bits

registry = torch.ops.fastrobust
CODE = {INF: 0, 2: 1, 1: 2}


def samples(batch: int = 3, shape: tuple[int, ...] = (3, 4, 4)) -> tuple[torch.Tensor, ...]:
    return tuple(t.requires_grad_() for t in images(1, batch, shape))


# ---- opcheck, always with inputs that require grad ----


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", ["numbers", "tensors", "masked", "empty", "half"])
def test_opcheck_steps(norm, case) -> None:
    batch = 0 if case == "empty" else 3
    x, x0, grad = samples(batch)
    if case == "half":
        grad = grad.detach().half().requires_grad_()
    tensors = case == "tensors"
    step = (torch.rand(batch), 0.0) if tensors else (None, 0.1)
    eps = (torch.rand(batch), 0.0) if tensors else (None, 0.3)
    active = torch.rand(batch) < 0.5 if case == "masked" else None
    box = (CODE[norm], 0.0, 1.0)
    torch.library.opcheck(registry.pgd_step.default, (x, x0, grad, *step, *eps, *box, active, True))
    torch.library.opcheck(registry.pgd_step.default, (x, x0, None, None, 0.0, *eps, *box, None, True))
    out = torch.empty_like(x.detach())
    torch.library.opcheck(registry.pgd_step_out.default, (x, x0, grad, *step, *eps, *box, active, True, out))
    torch.library.opcheck(registry.fosc.default, (x, x0, grad, *eps, CODE[norm]))
    torch.library.opcheck(registry.pgd_step_fosc.default, (x, x0, grad, *step, *eps, 0.5, *box, active))
    torch.library.opcheck(registry.pgd_step_fosc_out.default, (x, x0, grad, *step, *eps, 0.5, *box, active, out))
    v = torch.rand(batch, requires_grad=True)
    atas = (x, x0, grad, v, *step, *eps, *box, 0.5, 0.01, True, 0.0, 1.0, active)
    torch.library.opcheck(registry.atas_step_out.default, (*atas, out))
    for authors in (False, True):
        torch.library.opcheck(
            registry.atas_step.default, (x, x0, grad, v, *step, *eps, *box, 0.5, 0.01, authors, 0.0, 1.0, active)
        )
    torch.library.opcheck(registry.random_start.default, (x0, *eps, *box, 7, 0))


@pytest.mark.parametrize("layout", [torch.channels_last, "strided"])
def test_opcheck_layouts(layout) -> None:
    """The fake must tell the strides that the kernel returns."""
    made = []
    for t in images(1, 3, (3, 4, 6)):
        if layout == "strided":
            t = torch.stack([t, t], -1)[..., 0]
        else:
            t = t.contiguous(memory_format=layout)
        made.append(t.detach().requires_grad_())
    x, x0, grad = made
    torch.library.opcheck(registry.pgd_step.default, (x, x0, grad, None, 0.1, None, 0.3, 0, 0.0, 1.0, None, True))
    torch.library.opcheck(registry.pgd_step_fosc.default, (x, x0, grad, None, 0.1, None, 0.3, 0.5, 1, 0.0, 1.0, None))
    torch.library.opcheck(registry.random_start.default, (x0, None, 0.3, 2, 0.0, 1.0, 7, 0))
    v = torch.rand(6)[::2].requires_grad_()
    torch.library.opcheck(
        registry.atas_step.default,
        (x, x0, grad, v, None, 0.1, None, 0.3, 0, 0.0, 1.0, 0.5, 0.01, False, 0.0, 1.0, None),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 4])
def test_opcheck_losses(dtype, batch) -> None:
    logits = torch.randn(batch, 6, dtype=dtype, requires_grad=True)
    labels, targets = torch.randint(0, 6, (2, batch))
    for name in ("cross_entropy", "margin_loss", "dlr_loss"):
        torch.library.opcheck(getattr(registry, name).default, (logits, labels))
    torch.library.opcheck(registry.dlr_targeted_loss.default, (logits, labels, targets))
    torch.library.opcheck(
        registry.kl_divergence.default, (logits, torch.randn(batch, 6, dtype=dtype, requires_grad=True))
    )


def test_every_op_of_the_library_is_checked_here() -> None:
    """A new op in the PGD family wants its opcheck above."""
    mine = {"pgd_step", "pgd_step_out", "fosc", "pgd_step_fosc", "pgd_step_fosc_out", "atas_step",
            "atas_step_out", "random_start",
            "cross_entropy", "margin_loss", "dlr_loss", "dlr_targeted_loss", "kl_divergence"}  # fmt: skip
    for name in mine:
        assert registry.__getattr__(name).default.tags == [torch.Tag.pt2_compliant_tag]


# ---- compile ----


def step_function(norm):
    def f(x, x0, grad, step, eps, active, logits, labels):
        y = ops.pgd_step(x, x0, grad, 0.1, 0.3, norm)
        y = ops.pgd_step(y, x0, grad.half(), step, eps, norm, active=active, targeted=True)
        z, value, keep = ops.pgd_step_fosc(y, x0, grad, 0.1, eps, 0.5, norm)
        w, v, alpha = ops.atas_step(z, x0, grad, value.abs(), 0.1, 0.3, norm, active=keep)
        start = ops.random_start(x0, eps, norm, seed=5)
        return ops.project(w, x0, 0.2, norm), v, alpha, value, keep, start, *ops.margin_loss(logits, labels)

    return f


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_full_graph_gives_equal_results(norm, dynamic) -> None:
    torch._dynamo.reset()
    f = step_function(norm)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (4, 3):
        x, x0, grad = images(2, batch, (3, 5))
        step, eps, active = torch.rand(batch), torch.rand(batch), torch.tensor([True, False, True, True])[:batch]
        arguments = (x, x0, grad, step, eps, active, torch.randn(batch, 5), torch.randint(0, 5, (batch,)))
        for got, want in zip(compiled(*arguments), f(*arguments), strict=True):
            assert torch.equal(got, want)


def test_compile_with_out_and_with_a_model() -> None:
    torch._dynamo.reset()
    model = torch.nn.Linear(5, 3)

    def attack(x0, labels):
        x, memory = x0.clone(), torch.empty_like(x0)
        for _ in range(3):
            x.requires_grad_()
            (grad,) = torch.autograd.grad(ops.cross_entropy(model(x), labels).value.sum(), x)
            x = ops.pgd_step(x.detach(), x0, grad, 0.05, 0.1, out=memory).clone()
        return x

    x0, labels = torch.rand(4, 5), torch.tensor([0, 1, 2, 0])

    def one(x, x0, grad):
        out = torch.zeros_like(x)
        ops.pgd_step(x, x0, grad, 0.05, 0.1, out=out)
        return out + 1

    x, x0_, grad = images(2, 4, (5,))
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, x0_, grad), one(x, x0_, grad))
    y = attack(x0, labels)
    assert (y != x0).any() and ((y - x0).abs() <= 0.1).all()


def test_compiled_loss_backward() -> None:
    torch._dynamo.reset()
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])

    def f(z):
        return (ops.cross_entropy(z, labels).value * 2).sum() + ops.kl_divergence(z, z.detach() * 2).value.sum()

    grads = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        z = logits.clone().requires_grad_()
        g(z).backward()
        grads.append(z.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert grads[0].abs().sum() > 0


# ---- fake and meta tensors ----


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_fake_tensors_get_shapes_strides_and_types(norm, fmt) -> None:
    real = [t.contiguous(memory_format=fmt) for t in images(1, 3, (3, 4, 6))]
    v, labels = torch.rand(3), torch.tensor([0, 1, 2])

    def outputs(x, x0, grad, v, logits, labels):
        return [
            ops.pgd_step(x, x0, grad, 0.1, 0.3, norm),
            ops.project(x, x0, 0.3, norm),
            ops.random_start(x0, 0.3, norm, seed=1),
            ops.fosc(x, x0, grad, 0.3, norm),
            *ops.pgd_step_fosc(x, x0, grad, 0.1, 0.3, 0.5, norm),
            *ops.atas_step(x, x0, grad, v, 0.1, 0.3, norm),
            ops.pgd_step(x, x0, grad, v, v, norm, out=torch.empty_like(x)),
            *ops.cross_entropy(logits, labels),
            *ops.dlr_loss(logits, labels),
            *ops.kl_divergence(logits, logits),
        ]

    want = outputs(*real, v, torch.randn(3, 5), labels)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (*real, v, torch.randn(3, 5), labels)]
        got = outputs(*fakes)
    meta = outputs(*(t.to("meta") for t in (*real, v, torch.randn(3, 5), labels)))
    for a, b, w in zip(got, meta, want, strict=True):
        for t in (a, b):
            assert t.shape == w.shape and t.dtype == w.dtype and t.stride() == w.stride()


# ---- grad modes and autograd ----


@pytest.mark.parametrize("norm", NORMS)
def test_results_never_require_grad(norm) -> None:
    x, x0, grad = samples()
    v = torch.rand(3, requires_grad=True)
    results = [
        ops.pgd_step(x, x0, grad, v, v, norm),
        ops.pgd_step(x, x0, grad, 0.1, 0.3, norm),
        ops.project(x, x0, 0.3, norm),
        ops.random_start(x0, v, norm, seed=1),
        ops.fosc(x, x0, grad, v, norm),
        *ops.pgd_step_fosc(x, x0, grad, 0.1, 0.3, 0.5, norm),
        *ops.atas_step(x, x0, grad, v, 0.1, 0.3, norm),
        ops.pgd_step(x.double(), x0.double(), grad.double(), 0.1, 0.3, norm),
        ops.project(x.double(), x0.double(), 0.3, norm),
        ops.random_start(x0.double(), 0.3, norm, seed=1),
        ops.fosc(x.double(), x0.double(), grad.double(), 0.3, norm),
    ]
    for y in results:
        assert not y.requires_grad and y.grad_fn is None and y.is_leaf


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(norm, mode) -> None:
    x, x0, grad = images(1, 3, (3, 4, 4))
    want = ops.pgd_step(x, x0, grad, 0.1, 0.3, norm)
    with mode():
        inner = [t.clone() for t in (x, x0, grad)]  # inference tensors under inference_mode
        assert same_bits(ops.pgd_step(*inner, 0.1, 0.3, norm), want)
        assert same_bits(ops.pgd_step(*inner, torch.full((3,), 0.1), 0.3, norm), want)
        out = torch.empty_like(x)
        assert same_bits(ops.pgd_step(*inner, 0.1, 0.3, norm, out=out), want)
        assert same_bits(ops.pgd_step(*inner, torch.full((3,), 0.1), 0.3, norm, out=out), want)
        assert ops.random_start(inner[1], 0.3, norm).shape == x.shape
        assert torch.equal(ops.fosc(*inner, 0.3, norm), ops.fosc(x, x0, grad, 0.3, norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "negative"])
def test_out_bumps_the_version_so_that_autograd_notices(norm, layout) -> None:
    x, x0, grad = images(1, 3, (3, 4))
    for call in (
        lambda out: ops.pgd_step(x, x0, grad, 0.1, 0.3, norm, out=out),
        lambda out: ops.pgd_step(x, x0, grad, torch.full((3,), 0.1), 0.3, norm, out=out),
        lambda out: ops.project(x, x0, 0.3, norm, out=out),
    ):
        out = {"contiguous": x.clone(), "strided": torch.stack([x, x], -1)[..., 0], "negative": torch._neg_view(-x)}[
            layout
        ]
        weight = torch.ones_like(x, requires_grad=True)
        product = (weight * out).sum()  # saves out
        version = out._version
        call(out)
        assert out._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("norm", NORMS)
def test_inputs_are_not_modified(norm) -> None:
    x, x0, grad = images(1, 3, (3, 4))
    v, step, active = torch.rand(3), torch.rand(3), torch.tensor([True, False, True])
    given = (x, x0, grad, v, step, active)
    before, versions = [t.clone() for t in given], [t._version for t in given]
    ops.pgd_step(x, x0, grad, step, step, norm, active=active, targeted=True)
    ops.pgd_step_fosc(x, x0, grad, step, step, 0.1, norm, active=active)
    ops.atas_step(x, x0, grad, v, step, step, norm, active=active)
    ops.random_start(x0, step, norm, seed=1)
    for t, b, version in zip(given, before, versions, strict=True):
        assert torch.equal(t, b) and t._version == version


# ---- transforms ----


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_right_or_refuses(norm) -> None:
    x, x0, grad = (t.reshape(4, 2, 5) for t in images(1, 8, (5,)))
    try:
        y = torch.vmap(lambda a, b, c: ops.pgd_step(a, b, c, 0.1, 0.3, norm))(x, x0, grad)
    except RuntimeError:
        return
    assert torch.equal(
        y, torch.stack([ops.pgd_step(*parts, 0.1, 0.3, norm) for parts in zip(x, x0, grad, strict=True)])
    )
    out = torch.empty_like(x)
    try:
        torch.vmap(lambda a, b, c, o: ops.pgd_step(a, b, c, 0.1, 0.3, norm, out=o))(x, x0, grad, out)
    except RuntimeError:
        return
    assert torch.equal(out, y)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_loss_is_right_or_refuses() -> None:
    logits, labels = torch.randn(4, 3, 5), torch.randint(0, 5, (4, 3))
    for check, dtype in itertools.product((True, False), (torch.float32, torch.float64)):
        try:
            value = torch.vmap(lambda z, y: ops.cross_entropy(z, y, check=check).value)(logits.to(dtype), labels)  # noqa: B023
        except RuntimeError:
            continue
        torch.testing.assert_close(
            value, torch.stack([ops.cross_entropy(*p).value for p in zip(logits, labels, strict=True)]).to(dtype)
        )


def test_functorch_gradients_are_right_or_refused() -> None:
    """The steps are constants to autograd, as documented; a loss must not lose its gradient."""
    x, x0, grad = images(1, 3, (5,))
    through = torch.func.grad(lambda a: (ops.pgd_step(a, x0, grad, 0.1, 0.3) * a.detach()).sum())(x)
    assert (through == 0).all()
    direct = torch.func.grad(lambda a: (ops.pgd_step(a.detach(), x0, grad, 0.1, 0.3) * a).sum())(x)
    assert torch.equal(direct, ops.pgd_step(x, x0, grad, 0.1, 0.3))
    labels = torch.tensor([0, 1, 2])
    for dtype in (torch.float32, torch.float64):
        try:
            got = torch.func.grad(lambda z: ops.cross_entropy(z, labels, check=False).value.sum())(x.to(dtype))  # noqa: B023
        except RuntimeError:
            continue
        torch.testing.assert_close(got, ops.cross_entropy(x.to(dtype), labels).grad)


def test_subclasses_and_function_modes_are_seen() -> None:
    x, x0, grad = images(1, 3, (5,))
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Dispatch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    want = ops.pgd_step(x, x0, grad, 0.1, 0.3)
    for mode in (Watch, Dispatch):
        seen.clear()
        with mode():
            assert torch.equal(ops.pgd_step(x, x0, grad, 0.1, 0.3), want)
        assert "fastrobust.pgd_step.default" in map(str, seen)
    parameter = torch.nn.Parameter(x)
    y = ops.pgd_step(parameter, x0, grad, 0.1, 0.3)
    assert torch.equal(y, want) and not y.requires_grad


def test_deterministic() -> None:
    x, x0, grad = images(1, 16, (3, 32, 32))
    for norm in NORMS:
        first = [
            ops.pgd_step(x, x0, grad, 0.5, 0.7, norm),
            ops.fosc(x, x0, grad, 0.7, norm),
            ops.random_start(x0, 0.7, norm, seed=3),
        ]
        for _ in range(5):
            again = [
                ops.pgd_step(x, x0, grad, 0.5, 0.7, norm),
                ops.fosc(x, x0, grad, 0.7, norm),
                ops.random_start(x0, 0.7, norm, seed=3),
            ]
            assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_threads_and_batch_splits_do_not_matter() -> None:
    x, x0, grad = images(1, 7, (3, 64, 65))
    active = torch.tensor([True, True, False, True, True, True, False])
    v = torch.rand(7)

    def run(rows=slice(None)):
        parts = (x[rows], x0[rows], grad[rows])
        results = []
        for norm in NORMS:
            results += [
                ops.pgd_step(*parts, 0.5, 0.7, norm),
                ops.project(*parts[:2], 0.7, norm),
                ops.fosc(*parts, 0.7, norm),
            ]
            results += [*ops.pgd_step_fosc(*parts, 0.5, 0.7, 10.0, norm, active=active[rows])]
            results += [*ops.atas_step(*parts, v[rows], 0.5, 0.7, norm)]
        return results

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = run()
        torch.set_num_threads(2)
        assert all(same_bits(a, b) for a, b in zip(run(), want, strict=True))
        for cut in (1, 3):
            pieces = zip(run(slice(0, cut)), run(slice(cut, None)), want, strict=True)
            assert all(torch.equal(torch.cat([a, b]), w) for a, b, w in pieces)
    finally:
        torch.set_num_threads(before)


def test_null_addresses_are_refused_below() -> None:
    """Fake and meta tensors have address 0: the compiled module must not read there."""
    from fastrobust import _C

    with pytest.raises(ValueError, match="x: got a tensor without memory"):
        _C.pgd_simple_step(0, 0, 0, 0, 16, 1, 0, 0.1, 0.1, -math.inf, math.inf)
