"""What is kept with a weight has a bound, and what was dropped is made again."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastrobust as fr
from fastrobust import nn as fnn
from fastrobust.ops.binary import _feature_maps as fm

SIZES = [(n, h, w) for n in (1, 2, 5) for h in range(3, 12) for w in (3, 6, 9)]


def kept(packed) -> int:
    return max(len(v) for v in packed.index.__dict__.values() if isinstance(v, dict))


@pytest.mark.parametrize("path", ["plain", "lanes", "auto"])
def test_caches_are_bounded_and_results_right_in_any_order(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    w = torch.randn(6, 4, 3, 3).sign() * (torch.rand(6, 4, 3, 3) < 0.3)
    packed = fr.ops.pack(w)
    order = [SIZES[i] for i in torch.randint(len(SIZES), (150,)).tolist()]
    for n, h, w_ in order:
        x = torch.randn(n, 4, h, w_, requires_grad=True)
        y = fr.ops.masked_conv2d(x, packed, padding=1, relu=True)
        want = F.conv2d(x, w, padding=1).relu()
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        ours, theirs = (torch.autograd.grad(t.sum(), x)[0] for t in (y, want))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert kept(packed) <= fm.REMEMBERED


def test_views_of_many_strides_keep_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "lanes")
    packed = fr.ops.pack(torch.ones(3, 2, 3, 3))
    with torch.no_grad():
        for width in range(6, 90):
            x = torch.randn(2, 2, 6, width)[..., :6]
            torch.testing.assert_close(fr.ops.masked_conv2d(x, packed), F.conv2d(x, torch.ones(3, 2, 3, 3)))
    recipes = packed.index.__dict__["_fastrobust_recipes"].values()
    assert max(len(r.programs) for r in recipes) == fm.REMEMBERED


@given(order=st.lists(st.integers(0, len(SIZES) - 1), min_size=40, max_size=60))
def test_frozen_networks_of_many_sizes(order: list[int]) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1))
    model = fnn.convert(net, 0.5, 1.0).eval()
    frozen, dense = fnn.freeze(model), fnn.dense_copy(model)
    with torch.no_grad():
        for i in order:
            n, h, w = SIZES[i]
            x = torch.randn(n, 2, h, w)
            torch.testing.assert_close(frozen(x), dense(x), rtol=1e-4, atol=1e-4)
    for layer in fnn.masked_layers(model).values():
        assert kept(layer.packed()) <= fm.REMEMBERED


def test_recent_things_are_kept_and_copies_are_empty() -> None:
    recent = fm.Recent()
    for i in range(3 * fm.REMEMBERED):
        recent[i] = str(i)
        assert recent.get(0, "gone") == "0"
    assert len(recent) == fm.REMEMBERED and recent.get(1) is None
    assert copy.deepcopy(recent) == {} and type(copy.copy(recent)) is fm.Recent


def test_threads_that_share_a_weight() -> None:
    w = torch.randn(6, 4, 3, 3).sign()
    packed, wrong = fr.ops.pack(w), []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i in torch.randint(len(SIZES), (120,), generator=generator).tolist():
            n, h, w_ = SIZES[i]
            x = torch.randn(n, 4, h, w_, generator=generator)
            if not torch.allclose(
                fr.ops.masked_conv2d(x, packed, relu=True, padding=1), F.conv2d(x, w, padding=1).relu(), atol=1e-4
            ):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
