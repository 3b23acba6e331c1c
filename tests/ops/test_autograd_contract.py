"""What autograd, torch.func and the tracers are owed: versions, derivatives of every order, calls that are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust import ops
from fastrobust.reference import losses as reference
from pgd_oracles import INF, NORMS, images

# ---- versions ----


class Tagged(Tensor):
    """A subclass without a dispatch of its own."""


def _step_out(z: Tensor, x0: Tensor, grad: Tensor) -> Any:
    return torch.ops.fastrobust.pgd_step_out(z, x0, grad, None, 0.1, None, 0.2, 0, 0.0, 1.0, None, True, z)


def _fosc_out(z: Tensor, x0: Tensor, grad: Tensor) -> Any:
    return torch.ops.fastrobust.pgd_step_fosc_out(z, x0, grad, None, 0.1, None, 0.2, 0.5, 2, 0.0, 1.0, None, z)


def _atas_out(z: Tensor, x0: Tensor, grad: Tensor) -> Any:
    args = (None, 0.1, None, 0.2, 1, 0.0, 1.0, 0.5, 0.01, False, 0.0, 1.0, None)
    return torch.ops.fastrobust.atas_step_out(z, x0, grad, torch.zeros(len(z)), *args, z)


CHANNELS = (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "step": lambda z, x0, g: ops.pgd_step(z, x0, g, 0.1, 0.2, out=z),
    "step, radius per example": lambda z, x0, g: ops.pgd_step(z, x0, g, 0.1, torch.full((len(z),), 0.2), 2, out=z),
    "step, box per channel": lambda z, x0, g: ops.pgd_step(z, x0, g, 0.1, 0.2, clip=CHANNELS, out=z),
    "project": lambda z, x0, g: ops.project(z, x0, 0.01, 1, out=z),
    "fosc": lambda z, x0, g: ops.pgd_step_fosc(z, x0, g, 0.1, 0.2, -1.0, 1, out=z),
    "atas": lambda z, x0, g: ops.atas_step(z, x0, g, torch.zeros(len(z), dtype=z.dtype), 0.1, 0.2, 2, out=z),
    "registered step": _step_out,
    "registered fosc": _fosc_out,
    "registered atas": _atas_out,
}
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda t: t,
    "parameter": lambda t: nn.Parameter(t, requires_grad=False),
    "subclass": lambda t: t.as_subclass(Tagged),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, t], -1)[..., 1],
    "float64": lambda t: t.double(),
}


class Default(AbstractContextManager[None]):
    def __enter__(self) -> None:
        torch.set_default_device("cpu")

    def __exit__(self, *_: Any) -> None:
        torch.set_default_device(None)


AROUND: dict[str, Callable[[], Any]] = {
    "nothing": nullcontext,
    "device": lambda: torch.device("cpu"),
    "default": Default,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen_by_autograd(write: str, kind: str, around: str) -> None:
    z, x0, grad = images(3, 2, (3, 4, 5))
    z = KINDS[kind](z)
    x0, grad = x0.to(z.dtype), grad.to(z.dtype)
    weight = torch.randn(z.shape, dtype=z.dtype, requires_grad=True)
    with AROUND[around]():
        product = (weight * z).sum()  # saves z
        before = z.detach().clone()
        WRITES[write](z, x0, grad)
        assert not torch.equal(z, before)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("write", WRITES)
def test_a_view_shares_the_version(write: str) -> None:
    base = torch.rand(4, 3, 4, 5)
    version = base._version
    WRITES[write](base[1:3], torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5))
    assert base._version > version


@pytest.mark.parametrize("norm", NORMS)
def test_out_with_a_history_is_refused(norm: float) -> None:
    """Its gradients would be those of what it held before."""
    x, x0, grad = images(4, 2, (3, 4))
    source = torch.rand(2, 3, 4, requires_grad=True)
    out = source * 2
    with pytest.raises(ValueError, match="out: got .*history.*expected"):
        ops.pgd_step(x, x0, grad, 0.1, 0.2, norm, out=out)
    assert torch.equal(out, source * 2)
    with torch.no_grad():  # as torch's own operations
        ops.pgd_step(x, x0, grad, 0.1, 0.2, norm, out=out)
    leaf = x.clone().requires_grad_()
    ops.pgd_step(leaf, x0, grad, 0.1, 0.2, norm, out=leaf)
    assert leaf.is_leaf and torch.equal(leaf, ops.pgd_step(x, x0, grad, 0.1, 0.2, norm))


# ---- losses: derivatives of every order ----

LABELS, TARGETS = torch.tensor([2, 0, 5]), torch.tensor([1, 6, 3])
CLEAN = torch.linspace(-2, 1, 21, dtype=torch.float64).reshape(3, 7).flip(1)
LOSSES: dict[str, tuple[Tensor, ...]] = {
    "cross_entropy": (LABELS,),
    "margin_loss": (LABELS,),
    "dlr_loss": (LABELS,),
    "dlr_targeted_loss": (LABELS, TARGETS),
    "kl_divergence": (CLEAN,),
}


def written_out(name: str, z: Tensor, *others: Tensor) -> Tensor:
    """The formulas by indexing, away from ties."""
    rows = torch.arange(len(z))
    if name == "cross_entropy":
        return z.logsumexp(1) - z[rows, others[0]]
    if name == "kl_divergence":
        p, q = others[0].softmax(1), z.softmax(1)
        return (p * (p / q).log()).sum(1)
    y = others[0]
    top = z.detach().argsort(1, descending=True)
    rival = torch.where(top[:, 0] == y, top[:, 1], top[:, 0]) if len(others) == 1 else others[1]
    gap = z[rows, y] - z[rows, rival]
    if name == "margin_loss":
        return -gap
    low = z[rows, top[:, 2]] if len(others) == 1 else (z[rows, top[:, 2]] + z[rows, top[:, 3]]) / 2
    return -gap / (z[rows, top[:, 0]] - low + 1e-12)


def ours(name: str, z: Tensor, *others: Tensor) -> Tensor:
    return getattr(ops, name)(z, *others).value


def logits(seed: int = 0) -> Tensor:
    return torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_penalty_trains_as_it_would_by_formulas(name: str, dtype: torch.dtype) -> None:
    """The second derivative through a network: what GradAlign and input-gradient regularisation take."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7)).to(dtype)
    x, others = torch.randn(3, 5, dtype=dtype), [o.to(dtype) if o.is_floating_point() else o for o in LOSSES[name]]

    def penalty(loss: Callable[..., Tensor]) -> list[Tensor]:
        image = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(
            (loss(name, net(image), *others) * torch.tensor([1.0, -2.0, 0.5])).sum(), image, create_graph=True
        )  # noqa: E501
        return list(torch.autograd.grad(g.square().sum(), list(net.parameters()), allow_unused=True))

    for got, want in zip(penalty(ours), penalty(written_out), strict=True):
        if want is None or got is None:  # the last bias shifts all logits or the margin's gradient does not know it
            assert all(t is None or not t.abs().max() > 1e-5 for t in (got, want))
            continue
        torch.testing.assert_close(
            got, want, rtol=2e-4 if dtype == torch.float32 else 1e-9, atol=1e-5 if dtype == torch.float32 else 1e-11
        )  # noqa: E501


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_by_differences(name: str) -> None:
    z = logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ours(name, z, *LOSSES[name]), z)
    assert torch.autograd.gradgradcheck(lambda z: ours(name, z, *LOSSES[name]), z)


def test_derivatives_of_kl_in_both_arguments() -> None:
    pair = (logits(2).requires_grad_(), logits(3).requires_grad_())
    assert torch.autograd.gradgradcheck(lambda z, r: ops.kl_divergence(z, r).value, pair)


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: torch.func.grad(lambda z: f(z).sum()),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(lambda z: f(z).sum()),
    "jvp": lambda f: lambda z: torch.func.jvp(f, (z,), (z.cos(),)),
    "autograd's hessian": lambda f: lambda z: torch.autograd.functional.hessian(lambda z: f(z).sum(), z),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_of_a_loss(name: str, transform: str) -> None:
    got, want = (TRANSFORMS[transform](lambda z: f(name, z, *LOSSES[name]))(logits(4)) for f in (ours, written_out))  # noqa: B023
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("inner", [lambda f: f, torch.func.grad, torch.func.hessian])
def test_vmap_over_examples(name: str, inner: Any) -> None:
    def one(z: Tensor, *others: Tensor) -> Tensor:
        return ours(name, z[None], *(o[None] for o in others))[0]

    z = logits(5)
    got = torch.vmap(inner(one))(z, *LOSSES[name])
    rows = [inner(one)(z[i], *(o[i] for o in LOSSES[name])) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(rows), rtol=1e-9, atol=1e-11)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode(name: str) -> None:
    z, direction = logits(6), logits(7)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(ours(name, dual, *LOSSES[name])).tangent
    want = (getattr(ops, name)(z, *LOSSES[name]).grad * direction).sum(1)
    torch.testing.assert_close(tangent, want, rtol=1e-9, atol=1e-11)


def test_compiled_torch_func() -> None:
    torch._dynamo.reset()
    f = torch.func.grad(lambda z: ops.cross_entropy(z, LABELS).value.sum())
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(logits(8))
    torch.testing.assert_close(got, logits(8).softmax(1) - F.one_hot(LABELS, 7))


def test_ties_have_one_gradient_whichever_way() -> None:
    z, y = torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 3])
    for name in ("margin_loss", "dlr_loss"):
        direct = getattr(ops, name)(z, y).grad
        through = torch.func.grad(lambda z: getattr(ops, name)(z, y).value.sum())(z)  # noqa: B023
        recorded = torch.autograd.grad(getattr(reference, name)(z.requires_grad_(), y).sum(), z)[0]
        assert torch.equal(direct, through) and torch.equal(direct, recorded)
        z = z.detach()


# ---- distances: one derivative ----


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return ops.polyhedral_distance(a, b, -0.5, 0.5, 2)  # type: ignore[return-value]


def test_distance_under_torch_func() -> None:
    a, b = torch.randn(4, 9), torch.rand(4)
    leaf = a.clone().requires_grad_()
    (want,) = torch.autograd.grad(_distance(leaf, b).sum(), leaf)
    assert want.abs().sum() > 0
    assert torch.equal(torch.func.grad(lambda a: _distance(a, b).sum())(a), want)
    per_row = torch.vmap(torch.func.grad(lambda a, b: _distance(a[None], b[None])[0]))
    assert torch.equal(per_row(a, b), want)


def test_distance_refuses_a_second_derivative() -> None:
    """Also where the incoming gradient is a constant, which torch's once_differentiable lets pass."""
    a, b = torch.randn(4, 9, requires_grad=True), torch.rand(4)
    (g,) = torch.autograd.grad(_distance(a, b).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        (g.square().sum() + a.square().sum()).backward()
    with pytest.raises(RuntimeError, match="first derivatives alone"):
        torch.func.jacrev(torch.func.jacrev(lambda a: _distance(a, b).sum()))(a.detach())


# ---- tracing, export, compile ----


class Everything(nn.Module):
    def __init__(self, norm: float, clip: Any) -> None:
        super().__init__()
        self.norm, self.clip = norm, clip
        self.register_buffer("labels", LABELS)  # torch 2.6 exports no tensor that is neither a buffer nor an argument
        self.register_buffer("targets", TARGETS)

    def forward(self, x: Tensor, x0: Tensor, grad: Tensor, v: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        norm, clip = self.norm, self.clip
        y = ops.pgd_step(x, x0, grad, 0.1, 0.3, norm, clip)
        moved, value, keep = ops.pgd_step_fosc(y, x0, grad, 0.1, v, 0.5, norm, clip)
        again, average, alpha = ops.atas_step(moved, x0, grad, v, 0.1, 0.3, norm, clip, active=keep)
        start = ops.random_start(x0, 0.2, norm, clip, seed=4)
        return (
            ops.project(again, x0, 0.2, norm, clip),
            value,
            keep,
            average,
            alpha,
            start,
            ops.fosc(x, x0, grad, 0.1, norm),
            *ops.cross_entropy(z, self.labels),
            *ops.dlr_targeted_loss(z, self.labels, self.targets),
            *ops.kl_divergence(z, z.flip(1)),
            ops.polyhedral_distance(z, z.amax(1), -0.5, 0.5, 2),
        )  # type: ignore[return-value]


def arguments(seed: int) -> tuple[Tensor, ...]:
    return (
        *images(seed, 3, (3, 4, 5)),
        torch.rand(3, generator=torch.Generator().manual_seed(seed)) + 0.1,
        logits(seed).float(),
    )


def spoil_free_memory() -> None:
    """So that memory nobody writes to does not hold the right values by chance."""
    for t in (*arguments(0), torch.empty(3)):
        torch.full(t.shape, 7e7)


MODULES = [Everything(norm, clip) for norm in NORMS for clip in ((0.0, 1.0), CHANNELS)]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("module", MODULES, ids=lambda m: f"{m.norm}-{len(str(m.clip))}")
def test_jit_trace_records_the_ops(module: Everything) -> None:
    traced = torch.jit.trace(module, arguments(1), check_trace=False)
    spoil_free_memory()
    for seed in (1, 2):
        for got, want in zip(traced(*arguments(seed)), module(*arguments(seed)), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: f"{m.norm}-{len(str(m.clip))}")
def test_export_records_the_ops(module: Everything) -> None:
    exported = torch.export.export(module, arguments(1)).module()
    for seed in (1, 2):
        for got, want in zip(exported(*arguments(seed)), module(*arguments(seed)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


class Start(nn.Module):
    def forward(self, x0: Tensor) -> Tensor:
        return ops.random_start(x0, 0.1, 2)


def _trace(m: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(m, (x,), check_trace=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "record",
    [
        lambda m, x: torch.compile(m, fullgraph=True, backend="aot_eager"),
        lambda m, x: torch.export.export(m, (x,)).module(),
        _trace,
    ],
    ids=["compile", "export", "trace"],
)
def test_a_recorded_start_draws_anew(record: Any) -> None:
    """A seed of None in a graph: another start in every run, torch.manual_seed decides, the ball holds."""
    torch._dynamo.reset()
    x0 = torch.rand(2, 3, 5)
    start = record(Start(), x0)
    torch.manual_seed(3)
    first, second = start(x0), start(x0)
    torch.manual_seed(3)
    assert torch.equal(start(x0), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(Start()(x0), first)
    assert ((second - x0).double().flatten(1).norm(dim=1) <= 0.1).all() and (first != x0).any()


def test_a_start_under_a_device_that_has_no_values() -> None:
    x0 = torch.rand(2, 5)
    with torch.device("meta"):
        start = ops.random_start(x0, 0.1)
    assert start.device.type == "cpu" and ((start - x0).abs() <= 0.1).all()


def test_infinite_steps_of_zero_gradients() -> None:
    """inf * sign(0) is no number: a coordinate without a gradient stays, in every type."""
    x, x0, grad = images(9, 3, (4, 5))
    grad[0] = 0
    for norm in NORMS:
        for dtype in (torch.float32, torch.float64):
            args = (x.to(dtype), x0.to(dtype), grad.to(dtype))
            for clip in ((0.0, 1.0), None, (torch.zeros(4, 5), 1.0)):
                y = ops.pgd_step(*args, math.inf, 0.25, norm, clip)
                assert y.dtype == dtype and not y.isnan().any()
                assert torch.equal(y[:1], ops.project(*(t[:1] for t in args[:2]), 0.25, norm, clip))
    still = ops.pgd_step(x.double(), x0.double(), torch.zeros_like(x).double(), torch.full((3,), INF), 0.25)
    assert torch.equal(still, ops.project(x.double(), x0.double(), 0.25))
