"""Attacks that run at once, inside each other, or on wrapped models: modes, statistics and results as of one alone."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import _modes


def _mixed() -> nn.Sequential:
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 1),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.Linear(36, 5),
    ).train()
    model[4].eval()
    return model


def _state(model: nn.Module) -> tuple[list[bool], dict[str, Tensor]]:
    return [m.training for m in model.modules()], copy.deepcopy(model.state_dict())


def _same(a: Any, b: Any) -> bool:
    return a[0] == b[0] and all(torch.equal(a[1][k], b[1][k]) for k in b[1])


def _together(*work: Callable[[], object]) -> list[BaseException]:
    """Runs them in threads that start at once, and gives what they raised."""
    barrier, raised = threading.Barrier(len(work)), []

    def run(f: Callable[[], object]) -> None:
        barrier.wait()
        try:
            f()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in work]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads) and not _modes._held
    return raised


@pytest.mark.parametrize("modes", [("eval",) * 4, ("keep",) * 4, ("eval", "keep", "eval", "keep")], ids=str)
def test_threads_that_attack_one_model_leave_it_as_it_was(modes: tuple[Any, ...]) -> None:
    x, y = h.small_batch()
    model = _mixed()
    alone = {m: fr.attacks.pgd(model, x, y, eps=0.1, steps=2, seed=0, model_mode=m) for m in ("eval", "keep")}
    before, results = _state(model), []

    def work(mode: Any) -> None:
        for _ in range(3):
            results.append((mode, fr.attacks.pgd(model, x, y, eps=0.1, steps=2, seed=0, model_mode=mode)))

    assert not _together(*(functools.partial(work, mode) for mode in modes))
    assert _same(_state(model), before) and len(results) == 12
    assert all(torch.equal(adv, alone[mode]) for mode, adv in results) and not torch.equal(*alone.values())


def test_the_last_of_two_restores_what_the_first_found() -> None:
    """The two overlap for sure: each waits inside the model until the other is there too, and they end one by one."""
    x, y = h.small_batch()
    model, both, first_done = _mixed(), threading.Barrier(2, timeout=30), threading.Event()
    before, seen = _state(model), []

    def meet(module: nn.Module, _: Any) -> None:
        both.wait()
        seen.append(module.training)

    handle = model[0].register_forward_pre_hook(meet)

    def first() -> None:
        fr.attacks.fgsm(model, x, y, eps=0.1)
        first_done.set()

    def second() -> None:
        with _modes.undisturbed(model, "eval"):
            fr.attacks.fgsm(model, x, y, eps=0.1)
            assert first_done.wait(30)
            seen.append(model[0].training)  # the first has ended, this one has not

    raised = _together(first, second)
    handle.remove()
    assert not raised and _same(_state(model), before) and seen == [False] * 3


def test_submodules_shared_by_two_models() -> None:
    x, y = h.small_batch()
    net = _mixed()
    wrapped = nn.Sequential(nn.Identity(), net).train()
    before = _state(wrapped)
    calls = [functools.partial(fr.attacks.pgd, m, x, y, eps=0.1, steps=2, seed=0) for m in (net, wrapped, net, wrapped)]
    assert not _together(*calls) and _same(_state(wrapped), before)


def test_one_that_fails_does_not_disturb_the_other() -> None:
    x, y = h.small_batch()
    model = _mixed()
    wanted, before = fr.attacks.pgd(model, x, y, eps=0.1, steps=4, seed=0), _state(model)
    found: list[Tensor] = []

    def fails(z: Tensor, _: Tensor) -> Tensor:
        raise ZeroDivisionError

    raised = _together(
        lambda: fr.attacks.pgd(model, x, y, eps=0.1, loss=fails),
        lambda: found.append(fr.attacks.pgd(model, x, y, eps=0.1, steps=4, seed=0)),
    )
    assert [type(e) for e in raised] == [ZeroDivisionError] and torch.equal(found[0], wanted)
    assert _same(_state(model), before)


@pytest.mark.parametrize("outer", ["eval", "keep"])
@pytest.mark.parametrize("inner", ["eval", "keep"])
def test_an_attack_inside_an_attack(outer: Any, inner: Any) -> None:
    x, y = h.small_batch()
    model = _mixed()
    before, modes = _state(model), []

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        modes.append(model[1].training)
        fr.attacks.fgsm(model, x, y, eps=0.1, model_mode=inner)
        modes.append(model[1].training)
        return F.cross_entropy(z, labels, reduction="none")

    fr.attacks.pgd(model, x, y, eps=0.1, steps=2, loss=loss, model_mode=outer)
    assert modes == [outer == "keep"] * 4 and _same(_state(model), before) and not _modes._held


def test_modes_of_bound_methods_and_partials() -> None:
    x, y = h.small_batch()
    model = _mixed()
    before = _state(model)
    wanted = fr.attacks.pgd(model, x, y, eps=0.1, seed=0)
    for given in (model.forward, functools.partial(model.forward), functools.partial(model)):
        assert torch.equal(fr.attacks.pgd(given, x, y, eps=0.1, seed=0), wanted)
        assert _same(_state(model), before)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["parallel", "compile"]
)
def test_wrappers(wrap: Callable[[nn.Module], Any]) -> None:
    x, y = h.small_batch()
    model = _mixed()
    wanted, before = fr.attacks.pgd(model, x, y, eps=0.1, seed=0), _state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(fr.attacks.pgd(wrap(model), x, y, eps=0.1, seed=0), wanted)
    assert _same(_state(model), before)


def _rank(rank: int, folder: str, depth: int, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    ddp = DistributedDataParallel(net)
    attacked = ddp if depth == 0 else nn.Sequential(nn.Identity(), ddp)
    x, y = h.small_batch(12, seed=rank)
    passes = []
    for k in range(2):
        attacked.train()
        found = fr.attacks.pgd(
            attacked, x, y, eps=0.6 if rank else 0.0, steps=3, restarts=2, early_stop=True, seed=k, return_details=True
        )
        passes.append(found.queries)
        F.cross_entropy(attacked(found.adv), y).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    every = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(every, weights)
    answers.put((rank, passes, torch.equal(*every), "forward" in vars(ddp), ddp.training))
    dist.destroy_process_group()


@pytest.mark.parametrize("depth", [0, 1], ids=["model", "inside the model"])
def test_ranks_of_ddp_need_not_make_the_same_number_of_passes(tmp_path: Any, depth: int) -> None:
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path), depth, answers), daemon=True) for r in range(2)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(120)
        if p.is_alive():
            p.kill()
    assert [p.exitcode for p in ranks] == [0, 0]
    (_, many, *first), (_, few, *second) = sorted(answers.get() for _ in ranks)
    assert first == second == [True, False, True] and sum(few) < sum(many)
