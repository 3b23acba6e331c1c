"""What people do around frozen models: arguments, outputs, modes, precision, transforms, and what has to be refused."""

from __future__ import annotations

import collections
import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import ModelMismatchError, UnreadableModelError
from fastrobust.nn import _layers, _program
from fastrobust.nn.freeze import REMEMBERED

Forward = Callable[..., Any]


class Net(nn.Module):
    def __init__(self, body: Forward) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.offset = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.norm.running_var.uniform_(2, 9)
        self.body = body

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, x, *args, **kwargs)

    def logits(self, h: Tensor) -> Tensor:
        return self.fc(h.mean((2, 3)))


def plain(m: Net, x: Tensor) -> Tensor:
    return m.logits(F.relu(m.norm(m.b(F.relu(m.a(x))))))


def masked(body: Forward = plain) -> Net:
    model = fr.nn.convert(Net(body), 0.5, 0.9).eval()
    assert isinstance(model, Net)
    return model


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 2, 7, 6, generator=torch.Generator().manual_seed(seed))


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = model(x)
    return torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum(), x)[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


ADDITIONS: dict[str, Forward] = {
    "behind another activation": lambda m, x: F.silu(m.b(h := F.leaky_relu(m.a(x))) + h),
    "the image": lambda m, x: F.relu(m.a(x)[:, :2] + x),
    "padded image": lambda m, x: F.relu(m.a(x) + F.pad(x, (0, 0, 0, 0, 0, 4))),
    "a parameter": lambda m, x: F.relu(m.a(x) + m.offset),
    "pooled maps": lambda m, x: F.relu(m.b(h := m.a(x)) + F.adaptive_avg_pool2d(h, 1)),
    "one row": lambda m, x: F.relu(m.a(x) + m.b(m.a(x))[:1]),
    "a number": lambda m, x: F.relu(m.a(x) + 0.5),
    "twice itself": lambda m, x: F.relu((h := m.a(x)) + h),
    "a view of itself": lambda m, x: F.relu((h := m.a(x)) + h.flip(1)[:, :, :, :]),
    "scaled": lambda m, x: F.relu(torch.add(m.b(h := m.a(x)), h, alpha=3)),
    "in place": lambda m, x: m.b(h := m.a(x)).add_(h).relu_() + h,
    "detached": lambda m, x: F.relu(m.b(h := m.a(x)) + h.detach()),
    "of another type": lambda m, x: F.relu(m.a(x) + m.b(m.a(x)).double()).float(),
}


@pytest.mark.parametrize("kind", ADDITIONS)
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_additions_of_all_kinds(kind: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    model = masked(ADDITIONS[kind])
    frozen = fr.nn.freeze(model)
    for n in (4, 3):
        close(frozen(images(n)), model(images(n)))
        close(gradient(frozen, images(n)), gradient(model, images(n)))


def test_arguments_are_those_of_the_model() -> None:
    def body(m: Net, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0, maps: bool = False) -> Tensor:
        h = m.a(x) * scale
        h = h if other is None else F.relu(h + m.a(other))
        return h if maps else m.logits(h)

    model = masked(body)
    frozen, x, y = fr.nn.freeze(model), images(), images(seed=1)
    for args, kwargs in (
        ((x,), {}), ((), {"x": x}), ((x, y), {}), ((x,), {"other": y, "scale": 2.0}), ((x,), {"maps": True}),
        ((x[:3], y[:3]), {}), ((x,), {"scale": 1}),
    ):  # fmt: skip
        close(frozen(*args, **kwargs), model(*args, **kwargs))
    with pytest.raises(TypeError):
        frozen(x, y, x)
    with pytest.raises(TypeError, match="unexpected keyword"):
        frozen(x, factor=2)
    for bad in ((), (3,), (None,)):
        with pytest.raises(TypeError, match="x: expected a float32 tensor"):
            frozen(*bad)
    for dtype in (torch.float64, torch.float16, torch.int64):
        with pytest.raises(TypeError, match="x: expected float32, got"):
            frozen(x.to(dtype))


Pair = collections.namedtuple("Pair", "logits maps")


@pytest.mark.parametrize(
    "pack",
    [
        lambda h, z: (z, h, z),
        lambda h, z: [z, {"maps": h, "none": None, "count": 3}],
        Pair,
        lambda h, z: collections.OrderedDict(b=z, a=(h, h)),
        lambda h, z: (h, h.argmax(1), z.topk(2)),
    ],
)
def test_outputs_of_any_structure(pack: Callable[[Tensor, Tensor], Any]) -> None:
    model = masked(lambda m, x: pack(h := m.a(x), m.logits(F.relu(m.norm(m.b(h))))))
    frozen, x = fr.nn.freeze(model), images().requires_grad_()
    got, want = frozen(x), model(x)
    flat, spec = torch.utils._pytree.tree_flatten(got)
    expected, other = torch.utils._pytree.tree_flatten(want)
    assert spec == other and type(got) is type(want)
    for g, w in zip(flat, expected, strict=True):
        if isinstance(w, Tensor):
            close(g, w)
        else:
            assert g == w
    grads = [
        torch.autograd.grad(sum(t.square().sum() for t in ts if isinstance(t, Tensor) and t.requires_grad), x)[0]
        for ts in (flat, expected)
    ]
    close(*grads)


def test_what_no_record_stands_for_is_refused() -> None:
    class Box:
        def __init__(self, t: Tensor) -> None:
            self.t = t

    for body, words in (
        (lambda m, x: m.a(x) if m.a(x).mean() > 0 else m.a(-x), "branches on values"),
        (lambda m, x: m.a(x + torch.rand_like(x)), "draws random numbers"),
        (lambda m, x: Box(m.a(x)), "returned Box, expected tensors"),
        (lambda m, x: m.a(x).masked_select(x[:, :1] > 0.5), "branches on values"),
    ):
        with pytest.raises(UnreadableModelError, match=words):
            fr.nn.freeze(masked(body))(images())
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(fr.nn.freeze(masked()), images())
    with pytest.raises(ValueError, match="check: got 'some', expected one of"):
        fr.nn.freeze(masked(), check="some")


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_what_leaves_torch_is_seen_by_the_check() -> None:
    outside = masked(lambda m, x: m.logits(m.a(torch.from_numpy(x.detach().numpy() * 2))))
    with pytest.raises(ModelMismatchError, match="outputs are not those"):
        fr.nn.freeze(outside)(images())
    straight = masked(lambda m, x: m.logits(_Rounded.apply(m.a(x))))
    frozen = fr.nn.freeze(straight)
    close(frozen(images()), straight(images()))
    for _ in range(2):  # it stays so
        with pytest.raises(ModelMismatchError, match="gradient with respect to the input"):
            gradient(frozen, images())
    hooked = masked()
    hooked.norm.register_full_backward_hook(lambda module, given, came: (2 * given[0],))
    with pytest.raises(ModelMismatchError, match="gradient with respect to the input"):
        gradient(fr.nn.freeze(hooked), images())


def test_a_wrong_program_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked()
    right = _layers.affine
    monkeypatch.setattr(_layers, "affine", lambda *args: (right(*args)[0] * 1.01, right(*args)[1]))
    frozen = fr.nn.freeze(model)
    for _ in range(2):
        with pytest.raises(ModelMismatchError, match="rounding explains"):
            frozen(images())
    unchecked = fr.nn.freeze(model, check="none")(images())
    assert not torch.allclose(unchecked, model(images()), rtol=1e-4, atol=1e-5)


def test_all_examples_are_compared_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _program.Program.outputs

    def outputs(self: Any, tensors: Any) -> Any:
        (out,) = real(self, tensors)
        out = out.clone()
        out[-1] += 1
        return [out]

    model = masked()
    monkeypatch.setattr(_program.Program, "outputs", outputs)
    fr.nn.freeze(model)(images())
    with pytest.raises(ModelMismatchError):
        fr.nn.freeze(model, check="all")(images())


def test_another_batch_size_runs_no_model() -> None:
    calls: list[int] = []

    def body(m: Net, x: Tensor) -> Tensor:
        calls.append(x.shape[0] + 0)
        assert x.shape[0] * x[0].numel() == x.numel() and x.shape[1] == 2
        return plain(m, x) * (2 if x.shape[0] > 40 else 1)

    model = masked(body)
    frozen = fr.nn.freeze(model, check="none")
    want = {n: model(images(n)) for n in (30, 17, 2, 29, 50, 51, 1)}
    del calls[:]
    for n in (30, 17, 2, 29):
        close(frozen(images(n)), want[n])
    assert len(calls) == 3  # the small batches of the record
    assert len(frozen.regions) == 1
    for n in (50, 51, 1):  # which are asked for what no record of a small batch tells
        close(frozen(images(n)), want[n])
    assert len(calls) > 3
    del calls[:]
    frozen.update()
    close(frozen(images(30)), want[30])
    assert len(calls) == 1


def test_programs_of_many_shapes_are_forgotten() -> None:
    frozen = fr.nn.freeze(masked(), check="none")
    with torch.no_grad():
        for n in range(2, 2 + REMEMBERED + 20):
            frozen(torch.rand(n, 2, 3, 3))
    assert len(frozen._state.programs) == REMEMBERED


def test_autocast_changes_nothing() -> None:
    x = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        frozen = fr.nn.freeze(masked())
        other = copy.deepcopy(frozen.source)
        got, got_grad = frozen(x), gradient(frozen, x)
        rounded = frozen(x.bfloat16())
    assert got.dtype == rounded.dtype == torch.float32
    close(got, other(x))
    close(got_grad, gradient(other, x))
    close(rounded, other(x.bfloat16().float()))


def test_a_gradient_is_that_of_the_forward_that_ran() -> None:
    model = masked()
    frozen, old = fr.nn.freeze(model), copy.deepcopy(model)
    x = images().requires_grad_()
    frozen(x).sum().backward()
    x.grad = None
    out = frozen(x)
    with torch.no_grad():
        model.a.scores.neg_()
        model.norm.running_mean.add_(1)
    frozen.update()
    frozen(images(3)).sum()
    (grad,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(old(x).sum(), x)
    close(grad, want)
    close(frozen(x), model(x))


def test_modes_and_threads() -> None:
    model = masked(lambda m, x: m.logits(F.dropout(m.a(x), 0.5, m.training)) * (3 if m.training else 1))
    want = model(images(6))
    model.train()
    model.norm.eval()
    handle = model.a.register_forward_hook(lambda module, args, out: None)  # so that the model itself is run
    modes = [m.training for m in model.modules()]
    frozen, wrong = fr.nn.freeze(model), []

    def attack(seed: int) -> None:
        for i in range(5):
            n = 1 + (i + seed) % 6
            x = images(6)[:n].clone().requires_grad_()
            out = frozen(x)
            out.sum().backward()
            if not torch.allclose(out, want[:n], rtol=1e-4, atol=1e-5):
                wrong.append((seed, i))
            if seed == 0:
                frozen.update()

    threads = [threading.Thread(target=attack, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    handle.remove()
    assert not wrong and [m.training for m in model.modules()] == modes


def test_who_looks_on_sees_the_model() -> None:
    model = masked()
    frozen, x = fr.nn.freeze(model), images()
    want = model(x)
    close(torch.compile(frozen, fullgraph=True, backend="eager")(x), want)
    close(torch.func.vmap(lambda z: frozen(z[None])[0])(x), want)
    close(fr.nn.freeze(nn.DataParallel(model))(x), want)
    close(fr.nn.freeze(nn.Sequential(frozen, nn.Tanh()))(x), want.tanh())
    with torch.device("cpu"):
        close(fr.nn.freeze(model)(x), want)
    with torch.inference_mode():
        close(fr.nn.freeze(model)(x.clone()), want)
    close(frozen(x.contiguous(memory_format=torch.channels_last)), want)
    close(frozen(x[:1].expand(4, -1, -1, -1)), model(x[:1].expand(4, -1, -1, -1)))


def test_models_that_change_themselves_or_their_input() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        x -= 0.5
        m.latest = m.a(x.mul_(2))
        return m.logits(m.latest)

    model = masked(body)
    frozen, x = fr.nn.freeze(model), images()
    kept = x.clone()
    got = frozen(x)
    assert torch.equal(x, kept)
    close(got, model(x.clone()))
    assert model.latest.requires_grad
    frozen.update()  # of a model that cannot be copied now: it holds a tensor with a history
    close(frozen(x), got)


class _Bare(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, _Bare])
def test_compact_cuts_behind_norms_of_any_class(norm: Callable[[int], nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 9, 3), norm(9), nn.ReLU(inplace=True), nn.Conv2d(9, 3, 3), nn.Flatten())
    model = fr.nn.convert(net, 0.9, 0.5).eval()
    small = fr.nn.compact(model, torch.rand(2, 1, 9, 9))
    close(small(x := torch.rand(4, 1, 9, 9)), model(x))
    assert small[0].out_channels < 9 and type(small[1]) is norm and small[1].num_features == small[0].out_channels


def test_compact_sees_who_else_reads_a_channel() -> None:
    def body(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        held = h[:, :1]
        return m.b(F.relu(h)).sum((2, 3)) + held.sum((1, 2, 3))[:, None]

    model = fr.nn.convert(Net(body), 0.97, 0.9).eval()
    small = fr.nn.compact(model)
    close(small(images()), model(images()))
    assert small.a.out_channels == 6
    branching = masked(lambda m, x: m.a(x) if x.sum() > 0 else m.a(-x))
    with pytest.raises(UnreadableModelError, match="branches on values"):
        fr.nn.compact(branching)
    with pytest.raises(ValueError, match="example: got none"):
        fr.nn.compact(fr.nn.convert(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(75, 2)), 0.5, 1.0))
