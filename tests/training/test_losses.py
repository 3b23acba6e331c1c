"""TRADES, MART and weight perturbation against their formulas written out."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import method_processes
from fastrobust.training import adversarial, losses, registry, weights
from fastrobust.training.method import Batch, Loss, Method
from method_helpers import EPS, blobs, by_hand, clipped, drawn, follow, moved, net, same, slope, split


def normal(x: Tensor) -> Tensor:
    """The start of both: x + .001 N(0, 1), by the inverse of the normal distribution function."""
    uniform = (drawn(torch.zeros_like(x), 1.0, None) + 1) / 2
    return x + 0.001 * torch.distributions.Normal(0.0, 1.0).icdf(uniform)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1)


def kl_slope(model: nn.Module, x: Tensor, clean: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(kl(clean.detach(), model(leaf).softmax(1)).sum(), leaf)[0]


def test_trades_is_algorithm() -> None:
    model, batches = net(), split(*blobs(), 5)

    def body(model: nn.Module, x: Tensor, y: Tensor, _: Batch) -> None:
        adv = clipped(normal(x), x, EPS)
        clean = model(x).softmax(1)
        for _k in range(3):
            adv = clipped(adv + 0.02 * kl_slope(model, adv, clean).sign(), x, EPS)
        p, q = model(x).softmax(1), model(adv).softmax(1)
        (-p[torch.arange(len(y)), y].log().mean() + 6 * kl(p, q).mean()).backward()

    same(follow(losses.TRADES(EPS, steps=3, step_size=0.02), model, batches), by_hand(body, model, batches), 1e-7)


def test_trades_computes_the_clean_logits_once_and_without_a_graph() -> None:
    model, (x, y) = net(batch_norm=True), blobs(6)
    calls: list[bool] = []
    model.register_forward_hook(lambda _m, _i, out: calls.append(out.requires_grad))
    losses.TRADES(EPS, steps=4).perturb(model, Batch(x, y))
    assert calls == [False, True, True, True, True]
    losses.MART(EPS, steps=4).perturb(model, Batch(x, y))
    assert calls[5:] == [True] * 4


def test_mart_is_algorithm() -> None:
    model, batches = net(), split(*blobs(), 5)

    def body(model: nn.Module, x: Tensor, y: Tensor, _: Batch) -> None:
        adv = clipped(normal(x), x, EPS)
        for _k in range(3):
            adv = clipped(adv + 0.02 * slope(model, adv, y).sign(), x, EPS)
        p, q = model(x).softmax(1), model(adv).softmax(1)
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(y)):
            others = [q[i, k] for k in range(3) if k != y[i]]
            boosted = -q[i, y[i]].log() - (1 - torch.stack(others).max()).log()
            total = total + boosted + 6 * kl(p[i : i + 1], q[i : i + 1])[0] * (1 - p[i, y[i]])
        (total / len(y)).backward()

    same(follow(losses.MART(EPS, steps=3, step_size=0.02), model, batches), by_hand(body, model, batches), 1e-7)


def test_mart_is_finite_where_a_rival_is_certain() -> None:
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(200.0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[0.0, 1.0, -1.0]]).expand(len(x), 3) * self.scale

    model = Sure()
    found = losses.MART().loss(model, Batch(torch.zeros(1, 1), torch.tensor([0])), torch.zeros(1, 1))
    found.value.backward()
    # -log p_y = 200, -log(1 - p_rival) = 200, and KL(p || p') = 0
    assert float(found.value.detach()) == pytest.approx(400) and math.isfinite(float(model.scale.grad))


def test_paper_settings() -> None:
    for name in ("trades", "mart"):
        method = registry.METHODS[name]()
        assert isinstance(method, losses._FromNearby)
        assert (method.eps, method.steps, method.beta, method.start_width) == (0.031, 10, 6.0, 0.001)
    adv = losses.TRADES(steps=1, start_width=0.0, clip=None)
    x, y = blobs(4)
    torch.manual_seed(0)
    model = net()
    # at the clean point the KL has no gradient: the noise is what lets the attack begin
    assert torch.equal(adv.perturb(model, Batch(x, y)), x)
    moved_by = (losses.TRADES(steps=1, clip=None).perturb(model, Batch(x, y)) - x).abs()
    assert 0.006 < float(moved_by.median()) < 0.008


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("warmup", [0, 1])
def test_awp_is_algorithm(batch_norm: bool, warmup: int) -> None:
    """Wu et al., with their copy of the model that takes a step at rate .01."""
    model, batches = net(batch_norm), split(*blobs(), 6, epochs=2)

    def body(model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        model.eval()
        adv = clipped(drawn(x, EPS), x, EPS)
        for _k in range(2):
            leaf = adv.clone().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
            adv = clipped(adv + EPS / 4 * grad.sign(), x, EPS)
        model.train()
        moves: dict[str, Tensor] = {}
        if batch.epoch >= warmup:
            proxy = copy.deepcopy(model)
            proxy.zero_grad()
            (-F.cross_entropy(proxy(adv), y)).backward()
            torch.optim.SGD(proxy.parameters(), lr=0.01).step()
            for (name, new), old in zip(proxy.named_parameters(), model.parameters(), strict=True):
                if new.dim() > 1:
                    diff = new.detach() - old.detach()
                    moves[name] = 0.05 * old.detach().norm() / (diff.norm() + 1e-20) * diff
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, v in moves.items():
                own[name].add_(v)
        F.cross_entropy(model(adv), y).backward()
        with torch.no_grad():
            for name, v in moves.items():
                own[name].sub_(v)

    method = weights.AWP(adversarial.PGD(EPS, steps=2), gamma=0.05, warmup=warmup)
    got = follow(method, model, batches)
    same(got, by_hand(body, model, batches))
    assert moved(got, follow(adversarial.PGD(EPS, steps=2), model, batches))
    if batch_norm:  # one pass a batch, whatever the passes that find v
        assert int(got[1].num_batches_tracked) == len(batches)  # type: ignore[union-attr,index]


def test_awp_moves_weights_of_two_dimensions_alone_and_puts_them_back() -> None:
    model, (x, y) = net(batch_norm=True), blobs(6)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []

    class Watching(Method):
        def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return super().loss(model, batch, adv)

    with pytest.raises(RuntimeError, match="stopped"):
        weights.AWP(Watching(), gamma=0.1).step(
            model, Batch(x, y), lambda _: (_ for _ in ()).throw(RuntimeError("stopped"))
        )
    assert len(seen) == 2 and all(torch.equal(seen[0][n], before[n]) for n in before)
    for name, p in before.items():
        distance = float((seen[1][name] - p).norm())
        assert distance == (pytest.approx(0.1 * float(p.norm())) if p.dim() > 1 else 0.0)
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), p, rtol=1e-14, atol=1e-14)


def test_awp_wraps_methods_by_name_and_refuses_those_that_update_alone() -> None:
    wrapped = weights.AWP("trades", gamma=0.005, warmup=10)
    assert isinstance(wrapped.method, losses.TRADES)
    assert wrapped.settings()["trades.beta"] == 6.0 and wrapped.settings()["method"] == "trades"
    assert wrapped.eps == 0.031 and not hasattr(wrapped, "nothing")
    assert isinstance(registry.METHODS["awp"]().method, adversarial.PGD)  # type: ignore[attr-defined]
    for method in (adversarial.FreeAT(), adversarial.YOPO()):
        with pytest.raises(ValueError, match="method: got .*, which updates in its own way"):
            weights.AWP(method)
    with pytest.raises(ValueError, match="method: got adaptive-targets, whose loss moves what it keeps"):
        weights.AWP("adaptive-targets")
    with pytest.raises(ValueError, match="method: got 'nothing'"):
        weights.AWP("nothing")
    with pytest.raises(TypeError, match="method: got int"):
        weights.AWP(3)  # type: ignore[arg-type]


def test_wrapping_trades_perturbs_by_the_loss_of_trades() -> None:
    model, batches = net(), split(*blobs(), 6)
    method = losses.TRADES(EPS, steps=1)

    def body(model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        adv = method.perturb(model, batch)
        model.train()
        value = method.loss(model, batch, adv).value
        named = {n: p for n, p in model.named_parameters() if p.dim() > 1}
        grads = torch.autograd.grad(value, list(named.values()))
        moves = [0.005 * p.detach().norm() * g / g.norm() for p, g in zip(named.values(), grads, strict=True)]
        with torch.no_grad():
            for p, v in zip(named.values(), moves, strict=True):
                p.add_(v)
        method.loss(model, batch, adv).value.backward()
        with torch.no_grad():
            for p, v in zip(named.values(), moves, strict=True):
                p.sub_(v)

    same(follow(weights.AWP(method, gamma=0.005), model, batches), by_hand(body, model, batches))


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    """One perturbation of the weights; perturbations, averages, targets and slots of each example or place of a
    batch."""
    script = Path(method_processes.__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path])}
    started = [
        subprocess.Popen([sys.executable, script, str(rank), tmp_path / "store", tmp_path / "out"], env=environment)
        for rank in range(2)
    ]
    want = {"awp": method_processes.train(0, 1), **{k: method_processes.keeping(k) for k in method_processes.KEEPING}}
    assert [process.wait(120) for process in started] == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"out{rank}", weights_only=True)
        for method, trained in want.items():
            for name, value in trained.items():
                close = (
                    {"rtol": 1e-9, "atol": 1e-12} if method == "awp" else {"rtol": 1e-4, "atol": 1e-6}
                )  # sent in float32
                torch.testing.assert_close(
                    found[method][name], value, **close, msg=lambda m, at=(method, name): f"{at}: {m}"
                )
