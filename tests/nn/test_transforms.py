"""Masked layers and ops under torch.func, twice differentiated, compiled, traced and exported: against a dense twin in
plain torch whose weights pass gradients straight through the mask."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastrobust as fr
from fastrobust import nn as fnn
from fastrobust.reference import binary as reference


def masked(absolute: bool = False, init: str = "signed_constant") -> nn.Sequential:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Softplus(), nn.Conv2d(8, 6, (3, 2), 2, bias=False), nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5),
    )  # fmt: skip
    return fnn.convert(net, 0.6, 0.5, absolute=absolute, init=init)


def twin(model: nn.Sequential, p: dict[str, Tensor], x: Tensor) -> Tensor:
    def weight(at: str) -> Tensor:
        layer, scores = model.get_submodule(at), p[f"{at}.scores"]
        values = scores.abs() if layer.absolute else scores
        mask = reference.topk_mask(layer.ranking(), layer.keep)
        return layer.signs * layer.magnitude * (mask + values - values.detach())

    y = F.softplus(F.conv2d(x, weight("0"), p["0.bias"], padding=1, groups=2))
    return F.linear(F.conv2d(y, weight("2"), None, 2).flatten(1), weight("4"), p["4.bias"])


def close(ours: object, want: object) -> None:
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (ours, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@pytest.fixture(params=["sparse", "dense"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTROBUST_BINARY", request.param)
    return request.param


@pytest.mark.parametrize("absolute", [False, True])
def test_torch_func_knows_masked_layers(absolute: bool) -> None:
    model = masked(absolute)
    p, x = {n: t.detach() for n, t in model.named_parameters()}, torch.randn(3, 4, 8, 7)

    def ours(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).square().sum()

    def want(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return twin(model, p, x).square().sum()

    def both(change) -> None:
        close(change(ours), change(want))

    both(lambda f: torch.func.grad(f, (0, 1))(p, x))
    both(lambda f: torch.vmap(torch.func.grad(lambda p, x: f(p, x[None])), (None, 0))(p, x))
    both(lambda f: torch.func.grad(lambda p, x: torch.func.grad(f, 1)(p, x).square().sum())(p, x))
    both(lambda f: torch.func.jvp(lambda x: f(p, x), (x,), (x.cos(),)))
    both(lambda f: torch.func.jacrev(lambda x: f(p, x))(x))


@pytest.mark.parametrize("init", fnn.INITIALISATIONS)
@pytest.mark.parametrize("absolute", [False, True])
def test_second_derivatives(absolute: bool, init: str, path: str) -> None:
    model = masked(absolute, init)
    p = dict(model.named_parameters())

    def second(f) -> tuple[Tensor, ...]:
        x = torch.linspace(-1, 1, 3 * 4 * 8 * 7).reshape(3, 4, 8, 7).requires_grad_()
        first = torch.autograd.grad(f(x).square().sum(), [x, p["2.scores"]], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *p.values()])

    close(second(model), second(lambda x: twin(model, p, x)))


def test_forward_mode() -> None:
    model, x = masked(), torch.randn(2, 4, 8, 7)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        ours = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        want = torch.autograd.forward_ad.unpack_dual(twin(model, dict(model.named_parameters()), dual)).tangent
    close(ours, want)


def test_several_gradients_at_once(path: str) -> None:
    model, x = masked(), torch.randn(2, 4, 8, 7, requires_grad=True)
    packed = fr.ops.pack(torch.randn(5, 4, 8, 7).sign())
    for y in (model(x), fr.ops.masked_conv2d(x, packed, relu=True).flatten(1)):
        wanted = torch.eye(y.numel()).reshape(-1, *y.shape)
        params = [x, *model.parameters()]
        together = torch.autograd.grad(y, params, wanted, is_grads_batched=True, retain_graph=True, allow_unused=True)
        for i, v in enumerate(wanted):
            one = torch.autograd.grad(y, params, v, retain_graph=True, allow_unused=True)
            close([t[i] for t in together if t is not None], [t for t in one if t is not None])


def test_checkpointed_and_stacked_models() -> None:
    model, x = masked(), torch.randn(3, 4, 8, 7)
    again = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(model, again, use_reentrant=False)
    given = x.clone().requires_grad_()
    params = list(model.parameters())
    ours = torch.autograd.grad(y.square().sum(), [again, *params])
    close(ours, torch.autograd.grad(model(given).square().sum(), [given, *params]))
    models = [masked() for _ in range(3)]
    for m in models:
        for p in m.parameters():
            nn.init.normal_(p)
    stacked = torch.func.stack_module_state(models)
    outs = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(*stacked)
    close(outs, torch.stack([m(x) for m in models]))


def test_functions_under_torch_func() -> None:
    w = torch.randn(6, 4, 3, 3).sign() * (torch.rand(6, 4, 3, 3) < 0.4)
    packed, x, scale = fr.ops.pack(w), torch.randn(5, 4, 7, 7), torch.rand(6)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return fr.ops.masked_conv2d(x, packed, stride=2, scale=scale, residual=torch.ones(5, 6, 3, 3), relu=True)

    def want(x: Tensor, scale: Tensor) -> Tensor:
        return (F.conv2d(x, w, None, 2) * scale.reshape(1, -1, 1, 1) + 1).relu()

    for f in (
        lambda f: torch.func.grad(lambda *a: f(*a).sum(), (0, 1))(x, scale),
        lambda f: torch.func.jvp(f, (x, scale), (x, scale)),
    ):
        close(f(ours), f(want))
    close(torch.vmap(lambda a: fr.ops.masked_conv2d(a[None], packed)[0])(x), F.conv2d(x, w))
    flat, rows = fr.ops.pack(w.flatten(1)), x[:, :, :3, :3].flatten(1)
    for kind in (torch.func.grad, torch.func.hessian):
        ours_, want_ = (
            torch.vmap(kind(lambda a, f=f: f(a).square().sum()))(rows)
            for f in (lambda a: fr.ops.masked_linear(a, flat), lambda a: F.linear(a, w.flatten(1)))
        )
        close(ours_, want_)


def test_traced_and_exported_models_choose_the_mask_when_they_run(path: str) -> None:
    model = masked().eval()
    x, other = torch.randn(3, 4, 8, 7), torch.randn(3, 4, 8, 7)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    exported = torch.export.export(model, (x,)).module()
    close([traced(other), exported(other)], [model(other)] * 2)
    assert "fastrobust::scored_conv2d" in str(traced.inlined_graph)
    turned = -model[2].scores.detach()
    with torch.no_grad():
        for program in (traced, exported, model):
            dict(program.named_parameters())["2.scores"].copy_(turned)
    close([traced(other), exported(other)], [model(other)] * 2)


def test_traced_functions_record_the_op(path: str) -> None:
    packed = fr.ops.pack(torch.randn(6, 4, 3, 3).sign())

    def f(x: Tensor) -> Tensor:
        return fr.ops.masked_conv2d(x, packed, relu=True) + fr.ops.masked_conv2d(x, packed)

    x, other = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    for _ in range(2):  # the second time the call is known by heart
        assert torch.equal(torch.jit.trace(f, (x,))(other), f(other))
        assert torch.equal(make_fx(f)(x)(other), f(other))


def test_compiled_models_learn_and_follow(path: str) -> None:
    torch._dynamo.reset()
    model = masked()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(f) -> list[Tensor]:
        x = torch.linspace(-1, 1, 3 * 4 * 8 * 7).reshape(3, 4, 8, 7).requires_grad_()
        y = f(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]

    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    for _ in range(3):
        results = run(compiled)
        close(results, run(model))
        for p, g in zip(model.parameters(), results[2:], strict=True):
            p.grad = g
        optimiser.step()
    model[2].scores.data.neg_()
    close(run(compiled), run(lambda x: twin(model, dict(model.named_parameters()), x)))


def test_ops_of_scores_check_what_they_are_given() -> None:
    op = torch.ops.fastrobust.scored_conv2d.default
    scores, signs, x = torch.randn(6, 4, 3, 3), torch.ones(6, 4, 3, 3, dtype=torch.int8), torch.randn(2, 4, 6, 6)
    rest = (9, False, (1, 1), (0, 0), (1, 1), 1)
    torch.library.opcheck(op, (x.requires_grad_(), scores.requires_grad_(), signs, *rest))
    torch.library.opcheck(
        torch.ops.fastrobust.scored_conv2d_input_grad.default,
        (torch.randn(2, 6, 4, 4, requires_grad=True), scores, signs, *rest, 6, 6),
    )
    for bad, text in (
        ((x[:, :3], scores, signs), r"x: expected \(N, 4, H, W\)"),
        ((x, scores, signs[:5]), "signs: got"),
        ((x[0], scores, signs), "x: expected"),
    ):
        with pytest.raises(ValueError, match=text):
            op(*bad, *rest)
