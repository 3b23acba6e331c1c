"""Regions of frozen networks compute what the dense network computes in float64, whatever their nodes and paths."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrobust as fr
import region_bodies
from fastrobust.nn import _choice
from fastrobust.ops.binary import _conv_cost as cost
from variant_runs import outputs_by_variant

BODIES = region_bodies.bodies()
TOLERANCE = 2e-4


def gradient(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Outputs, and the gradient of a sum of them with weights of mixed signs, alike for every example."""
    x = x.detach().requires_grad_()
    outs = tree_leaves(model(x))
    total = sum((o * torch.linspace(-1, 2, o.shape[1:].numel(), dtype=o.dtype).view(o.shape[1:])).sum() for o in outs)
    (found,) = torch.autograd.grad(total, x, allow_unused=True)
    return [o.detach() for o in outs], torch.zeros_like(x) if found is None else found


def clear(exact: nn.Module, x: Tensor, count: int) -> Tensor:
    """The examples whose gradient changes least when the image does a little: those away from the kinks."""
    noise = 2e-6 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (_, a), (_, b) = (gradient(exact, x.double() + s * noise) for s in (-1, 1))
    change = (a - b).flatten(1).abs().amax(1)
    best = change.topk(count, largest=False).indices
    return x[best]


@functools.cache
def given(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    model = region_bodies.masked(BODIES[name])
    exact = fr.nn.dense_copy(model).double()
    return (
        model,
        exact,
        clear(exact, torch.rand(30, *region_bodies.IMAGE, generator=torch.Generator().manual_seed(1)), 20),
    )


def forced(count: Callable[[int], int], lanes: Callable[[], int], dense: Callable[[], bool]) -> Callable[..., Any]:
    """`Chooser.parts` without estimates: how many images of those left in the next group, its lanes, who runs by
    torch."""

    def parts(self: _choice.Chooser, batch: int) -> tuple[_choice.Part, ...]:
        found = []
        while batch:
            n, wide = count(batch), lanes()
            choices = []
            for i, node in enumerate(self.nodes):
                e = node.cost(n, self.sizes, self.sizes[i], wide)
                path = "dense" if math.isinf(e.sparse) or dense() else "sparse"
                choices.append(dataclasses.replace(e, path=path))
            found.append(_choice.Part(n, wide, tuple(choices), 0.0))
            batch -= n
        return tuple(found)

    return parts


def choose(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how, _, number = mode.partition(" ")
    if how in ("auto", "dense"):
        monkeypatch.setenv("FASTROBUST_BINARY", how)
        return
    if how == "sparse":
        parts = forced(lambda n: n, lambda: 4, lambda: False)
    elif how == "lanes":
        parts = forced(lambda n: min(n, 13), lambda: int(number), lambda: False)
    else:
        draw = random.Random(int(number))
        parts = forced(
            lambda n: draw.randint(1, n), lambda: draw.choice(cost.LANES), lambda: draw.choice((False, True))
        )
    monkeypatch.setattr(_choice.Chooser, "parts", parts)


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape and got.dtype == torch.float32, what
    if want.numel():
        far = float((got.double() - want).abs().max())
        assert far <= TOLERANCE * float(want.abs().max()) + 1e-7, (what, far / float(want.abs().max()))


def check(name: str, sizes: list[int], channels_last: bool = False) -> None:
    model, exact, images = given(name)
    frozen = fr.nn.freeze(model, check="none")
    for n in sizes:
        form = torch.channels_last if channels_last else torch.contiguous_format
        x = images[:n].contiguous(memory_format=form)
        # Of two at least: torch's batch normalisation has false gradients for one image in memory of odd strides.
        want, want_grad = gradient(exact, images[: max(n, 2)].contiguous(memory_format=form).double())
        want, want_grad = [w[:n] for w in want], want_grad[:n]
        with torch.no_grad():
            without = tree_leaves(frozen(x))
        got, grad = gradient(frozen, x)
        with torch.inference_mode():
            inference = tree_leaves(frozen(x))
        for w, *outs in zip(want, without, got, inference, strict=True):
            for o, how in zip(outs, ("without a gradient", "with one", "in inference mode"), strict=True):
                close(o, w, f"{name}, {n}, {how}")
        close(grad, want_grad, f"{name}, {n}, gradient")
        assert grad.stride() == want_grad.stride()


MODES = ["sparse", "dense", "auto", "lanes 1", "lanes 4", "lanes 8", "lanes 16", *(f"random {i}" for i in range(5))]


@pytest.mark.parametrize("name", BODIES)
def test_region_is_the_dense_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One choice of paths, groups and lanes for each network, another one for its neighbours."""
    number = list(BODIES).index(name)
    choose(f"random {number}" if number % 2 else MODES[number // 2 % len(MODES)], monkeypatch)
    check(name, [3 if number % 3 else 17], number % 5 == 0)


@pytest.mark.thorough
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("mode", MODES)
def test_region_is_the_dense_network_in_every_way(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(mode, monkeypatch)
    check(name, [1, 2, 7, 16, 20], mode in ("auto", "random 1"))


WHOLE = "joined: dense, sum"


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 7, 16, 17, 33])
@pytest.mark.parametrize("mode", ["auto", "sparse", "random 3"])
def test_batches(batch: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(mode, monkeypatch)
    model, exact, images = given(WHOLE)
    frozen, x = fr.nn.freeze(model), images.repeat(2, 1, 1, 1)[:batch]
    (want,), want_grad = gradient(exact, x.double())
    (got,), grad = gradient(frozen, x)
    close(got, want, "output")
    close(grad, want_grad, "gradient")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:1, :, :, :1].expand(x.shape),
    "negative": lambda x: torch._neg_view(-x),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], 3)[:, :, :, ::2],
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "offset": lambda x: torch.cat([x.new_zeros(1, *x.shape[1:]), x])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["dense", "sparse", "random 2"])
def test_layouts_of_the_input(layout: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(mode, monkeypatch)
    for name in (WHOLE, "others: plain strided", "constants: normalised, pooled", "squares: of the image"):
        model, exact, images = given(name)
        frozen = fr.nn.freeze(model, check="none")
        for x in (images[:5], LAYOUTS[layout](images[:5])):  # the record is of the first
            (want,), want_grad = gradient(exact, x.double())
            (got,), grad = gradient(frozen, x)
            if layout == "expanded":  # kinks are where they are
                far = (grad.double() - want_grad).flatten(1).norm(dim=1) / want_grad.flatten(1).norm(dim=1)
                assert int((far > TOLERANCE).sum()) <= 1
            else:
                close(grad, want_grad, f"{name}, gradient")
            close(got, want, name)


@pytest.mark.parametrize("name", region_bodies.OUTPUTS)
@pytest.mark.parametrize("mode", ["dense", "sparse", "random 0"])
def test_outputs_lie_as_torchs_do(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(mode, monkeypatch)
    model, _, images = given(f"output: {name}")
    dense, frozen = fr.nn.dense_copy(model), fr.nn.freeze(model, check="none")
    for form in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        x = images[:4].contiguous(memory_format=form)
        if name == "copies" and form == torch.channels_last:
            continue  # what asks for a format itself is of the format that the first input led to
        for grad in (False, True):
            got, want = (tree_leaves(m(x.clone().requires_grad_(grad))) for m in (frozen, dense))
            assert [o.stride() for o in got] == [o.stride() for o in want]


@pytest.mark.parametrize("name", region_bodies.OUTPUTS)
@pytest.mark.parametrize("mode", ["auto", "dense", "sparse", "random 0", "random 4"])
def test_outputs_may_be_written_into(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the values before; no other output changes that shares no memory in the model."""
    choose(mode, monkeypatch)
    model, exact, images = given(f"output: {name}")
    frozen, x = fr.nn.freeze(model, check="none"), images[:5].clone()
    _, want = gradient(exact, x.double())
    x.requires_grad_()
    outs, others = (tree_leaves(m(x * 1)) for m in (frozen, fr.nn.dense_copy(model)))
    for o, other in zip(outs, others, strict=True):
        before = [t.detach().clone() for t in outs]
        with torch.no_grad():
            o.mul_(0.5)
        shared = [t.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for t in others]
        assert all(s or torch.equal(t, b) for s, t, b in zip(shared, outs, before, strict=True))
    total = sum((o * torch.linspace(-1, 2, o[0].numel()).view(o.shape[1:])).sum() for o in outs)
    close(torch.autograd.grad(total, x)[0], want, "gradient")


@pytest.mark.parametrize("mode", ["auto", "dense", "sparse", "random 1"])
@pytest.mark.parametrize("name", [WHOLE, "others: plain strided", "exp: depth", "max 3/2: between", "mish: add act"])
def test_gradients_once_more_after_other_runs(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(mode, monkeypatch)
    model, exact, images = given(name)
    frozen, x = fr.nn.freeze(model, check="none"), images[:9].clone().requires_grad_()
    (_, want), (_, other) = gradient(exact, images[:9].double()), gradient(exact, images[9:18].double())
    y = frozen(x)
    weight = torch.linspace(-1, 2, y[0].numel()).view(y.shape[1:])
    for _ in range(2):
        close(torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0], want, "gradient")
        close(gradient(frozen, images[9:18])[1], other, "gradient of other images")
    with torch.no_grad():
        x.add_(1)  # the region has what it needs
    close(torch.autograd.grad((y * weight).sum(), x)[0], want, "gradient after a step in place")


@pytest.mark.parametrize("mode", ["auto", "dense", "sparse", "random 1"])
def test_inputs_that_come_through_another_network(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(mode, monkeypatch)
    (model, exact, images), (after, exact_after, _) = given("joined: act + x, sum"), given("others: nearest")
    before, behind = fr.nn.freeze(model, check="none"), fr.nn.freeze(after, check="none")
    _, want = gradient(nn.Sequential(exact, nn.Tanh(), Thirds(), exact_after), images[:4].double())
    _, got = gradient(nn.Sequential(before, nn.Tanh(), Thirds(), behind), images[:4])
    far = (got.double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert int((far > 1e-3).sum()) == 0


class Thirds(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_the_default_dtype_does_not_matter(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(mode, monkeypatch)
    body = lambda m, x: F.max_pool2d(F.avg_pool2d(m.b(m.a(x) * 0.5 + 1).mul(2), 2) * 0.3, 2).mean((2, 3))  # noqa: E731
    model = region_bodies.masked(body)
    x = torch.rand(4, *region_bodies.IMAGE)
    (want,), want_grad = gradient(fr.nn.dense_copy(model).double(), x.double())
    torch.set_default_dtype(torch.float64)
    try:
        (got,), grad = gradient(fr.nn.freeze(model), x)
    finally:
        torch.set_default_dtype(torch.float32)
    close(got, want, "output")
    close(grad, want_grad, "gradient")


TOGETHER: dict[str, region_bodies.Body] = {
    "filters of the input": lambda m, x: m.b(F.conv2d(m.a(x), m.b(m.a(x))[:, :, :3, :3], padding=1)),
    "filters of the input, constant maps": lambda m, x: m.b(
        F.conv2d(m.image.expand(6, -1, -1, -1), m.b(m.a(x)), padding=4)
    ),
    "examples padded away": lambda m, x: m.b(F.pad(m.b(m.a(x)), (0, 0, 0, 0, 0, 0, -1, 1))),
    "examples rolled": lambda m, x: m.b(m.b(m.a(x)).roll(1, 0)),
    "factors of examples": lambda m, x: m.b(m.b(m.a(x)) * torch.arange(x.shape[0]).to(x.dtype).view(-1, 1, 1, 1)),
    "factors of rows": lambda m, x: m.rows2(
        m.rows(m.a(x).mean((2, 3))) * torch.arange(x.shape[0]).to(x.dtype).view(-1, 1)
    ),
    "first example": lambda m, x: m.b(m.a(x) + m.a(x)[:1] * m.b(m.a(x))[-1:]),
    "mean of examples": lambda m, x: m.b(m.a(x) * m.a(x).mean(0, keepdim=True)),
    "rows and their transpose": lambda m, x: m.rows2(
        (r := m.rows(m.a(x).mean((2, 3)))) + F.pad(r.t(), (0, 1))[:, :7][:6]
    ),
    "examples as channels": lambda m, x: m.b(m.a(x).view(-1, 3, 16, 6).reshape(-1, 6, 8, 6)),
    "another sign": lambda m, x: m.b(torch._neg_view(m.a(x))),
}


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("seed", range(3))
def test_examples_that_depend_on_each_other_are_not_taken_apart(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(f"random {seed}", monkeypatch)
    model = region_bodies.masked(TOGETHER[name])
    x = torch.rand(6, *region_bodies.IMAGE)
    want, want_grad = gradient(fr.nn.dense_copy(model).double(), x.double())
    got, grad = gradient(fr.nn.freeze(model, check="none"), x)
    close(got[0], want[0], "output")
    close(grad, want_grad, "gradient")


def test_regions_of_constants_of_a_call_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrobust.nn import freeze

    monkeypatch.setattr(importlib.import_module("fastrobust.nn.freeze"), "REMEMBERED", 3)
    body = lambda m, x: m.b(torch.sin(m.b(m.a(x) * (m.factor * 2))) * (m.factor * x.shape[3]))  # noqa: E731
    model = region_bodies.masked(body)
    frozen, dense = freeze(model, check="none"), fr.nn.dense_copy(model)
    with torch.no_grad():
        for width in range(4, 16):
            x = torch.rand(2, 3, 5, width)
            torch.testing.assert_close(frozen(x), dense(x), rtol=1e-3, atol=1e-3)
    assert len(frozen.regions) <= 2 * 3


VARIANT_SCRIPT = """
import hashlib, sys, torch, fastrobust as fr
sys.path[:0] = {paths!r}
import pytest
from test_regions import BODIES, choose, gradient, region_bodies
patch = pytest.MonkeyPatch()
for name in {names!r}:
    digest = hashlib.sha256()
    model = region_bodies.masked(BODIES[name])
    for mode in ("lanes 1", "lanes 8"):
        choose(mode, patch)
        outs, grad = gradient(fr.nn.freeze(model, check="none"), torch.linspace(0, 1, 7 * 144).view(7, 3, 8, 6).sin())
        for t in (*outs, grad):
            digest.update(t.contiguous().numpy().tobytes())
    print(digest.hexdigest())
"""


def test_every_cpu_variant_gives_the_same_bits() -> None:
    """Of networks without a node that torch runs, whose sums are not ours."""
    names = [
        "relu6: depth", "leaky negative: act add", "hardtanh odd: norm act conv", "gelu: add act", "mish: act norm",
        "elu alpha: twice", "softplus: act", "tanh: act add", "max 3/2: between", "max odd: of the image",
        "avg 3/1: between", "divisors: of a sum", "mean: of an activation", "constants: normalised, sum",
        "joined: pixel inside", "joined: dense, sum", "rows: flatten pooled", "rows: flat sum", "rows: residual rows",
        "output: inner pooled", "output: concatenated",
    ]  # fmt: skip
    here = pathlib.Path(__file__).parent
    script = VARIANT_SCRIPT.format(paths=[str(here), str(here.parent)], names=names)
    (first, *others) = outputs_by_variant(script).values()
    assert len(set(first)) == len(names)
    for other in others:
        assert [n for n, a, b in zip(names, first, other, strict=True) if a != b] == []


@pytest.mark.parametrize(
    "act",
    [nn.ReLU(True), nn.ReLU6(True), nn.LeakyReLU(0.1, True), nn.SiLU(True), nn.Hardswish(True), nn.ELU(1.0, True)],
)
def test_activations_in_place_are_part_of_the_write(act: nn.Module) -> None:
    """torch copies what they change, for a gradient that it computes itself; nobody reads the copy."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 3), act)
    frozen = fr.nn.freeze(fr.nn.convert(net, 0.5, 1.0).eval())
    x = torch.rand(3, 2, 8, 8, requires_grad=True)
    frozen(x).sum().backward()
    (region,) = frozen.regions.values()
    assert len(region.nodes) == 2 and all(unit.act.code[0] for unit in region.units)
