import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.analysis import subnetwork as S


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, (3, 1), 2), nn.Flatten(), nn.Linear(72, 3)
    )


def masked():
    torch.manual_seed(1)
    return fr.nn.convert(net(), 0.7, 0.5, init="binary")


def unchanged(model, action):
    model.train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    result = action()
    assert torch.equal(random, torch.get_rng_state()) and all(m.training for m in model.modules())
    for a, b in zip(state.values(), model.state_dict().values(), strict=True):
        assert a == b if isinstance(a, dict) else torch.equal(a, b)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    return result


def test_kept_weights_and_patterns_equal_a_loop():
    model = masked()
    found = unchanged(model, lambda: S.kept_weights(model))
    for name, layer in (("0", model[0]), ("2", model[2]), ("4", model[4])):
        mask = layer.mask()
        rows, columns = [0] * mask.shape[0], [0] * mask.shape[1]
        picture, turned = S.pattern(layer), S.pattern(layer, inputs_first=True)
        four = mask.reshape(*mask.shape, *[1] * (4 - mask.dim()))
        for o, i, a, b in itertools.product(*map(range, four.shape)):
            on = bool(four[o, i, a, b])
            rows[o] += on
            columns[i] += on
            assert picture[o * four.shape[2] + a, i * four.shape[3] + b] == on
            assert turned[i * four.shape[2] + a, o * four.shape[3] + b] == on
        assert found[name].outputs.tolist() == rows and found[name].inputs.tolist() == columns
        assert found[name].kept == layer.keep == sum(rows) and found[name].total == mask.numel()
    with pytest.raises(ValueError, match="model: got no masked layer"):
        S.kept_weights(net())


def test_aligned_counts_empty_channels():
    model = masked()
    with torch.no_grad():
        for layer, axis in ((model[0], 0), (model[2], 1)):
            layer.scores.fill_(1.0)
            layer.scores.transpose(0, axis)[:2] = -1.0
            layer.keep = int((layer.scores > 0).sum())
    assert S.aligned(model[0], model[2]) == S.Aligned(2, 2, 2, 1.0)
    with pytest.raises(ValueError, match="second: got 72 input channels"):
        S.aligned(model[0], model[4])


def test_random_channels():
    rows, columns = S.random_channels((8, 4, 3, 3), 50, draws=200)
    assert rows.sum() == pytest.approx(50) and columns.sum() == pytest.approx(50)
    assert (np.diff(rows) <= 0).all() and (np.diff(columns) <= 0).all()
    assert S.random_channels((3, 2), 6)[0].tolist() == [2, 2, 2]


def test_flops_are_those_of_the_table():
    model = masked()
    for binary in (False, True):
        sums = np.zeros(3)
        for layer, c2, s2, r_in, r_out in ((model[0], 9, 64, 1, 4), (model[2], 3, 12, 4, 6), (model[4], 1, 1, 72, 3)):
            rest = layer.keep / (c2 * r_in * r_out)  # 1 - r
            work, maps = rest * c2 * s2 * r_in * r_out, s2 * r_out
            if binary:
                sums += work + 11 * maps, work + 4 * maps, 3 * work + 4 * maps
            else:
                sums += 2 * work + 11 * maps, 2 * work + 4 * maps, 4 * work + 4 * maps + c2 * r_in * r_out
        found = unchanged(model, lambda binary=binary: S.flops(model, (1, 8, 8), binary=binary))
        assert found == pytest.approx(sums.tolist())
    with pytest.raises(ValueError, match="expected .*72"):  # images too small for the last layer
        S.flops(model, (1, 6, 6), binary=True)
    assert not any(m._forward_hooks for m in model.modules()) and all(m.training for m in model.modules())


CASES = [((3, 5), 4), ((2, 6, 9), 7), ((1, 1, 8), 5), ((4, 4, 4), 6), ((2, 12, 5, 3), 9), ((7,), 3)]


@pytest.mark.parametrize(("sizes", "kept"), CASES)
def test_theorems_hold_where_every_allocation_is_tried(sizes, kept):
    every = [m for m in itertools.product(*(range(n + 1) for n in sizes)) if sum(m) == kept]
    for check, value in (
        (S.theorem_5_1, lambda m: math.prod(math.comb(n, k) for n, k in zip(sizes, m, strict=True))),
        (S.theorem_5_2, math.prod),
    ):
        if check is S.theorem_5_2 and kept < len(sizes):
            continue
        top = max(map(value, every))
        found = check(sizes, kept)
        assert found.holds and {tuple(m) for m in found.best.tolist()} == {m for m in every if value(m) == top}


def test_allocate_at_its_ends_is_nearly_what_the_theorems_ask_for():
    sizes, kept = (6, 12, 24), 12
    even = fr.nn.allocate(sizes, 1 - kept / 42, 1.0, method="exact")
    assert abs(np.array(even) - S.theorem_5_1(sizes, sum(even)).best).sum(axis=1).min() <= 2
    same = fr.nn.allocate(sizes, 1 - kept / 42, 0.0)
    assert same in S.theorem_5_2(sizes, sum(same)).best.tolist()


def test_theorem_margins_speak_of_the_worst_optimum(monkeypatch):
    monkeypatch.setattr(S, "_best", lambda *_: np.array([[2, 2], [4, 0]]))  # what no optimum looks like
    assert S.theorem_5_1((4, 8), 4)[1:] == (pytest.approx(1 / 4 + 1 / 8 - 1), False)
    assert S.theorem_5_2((8, 8), 4)[1:] == (-3.0, False)


def test_equal_width():
    def build(width):
        return nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 5))

    state = torch.get_rng_state()
    assert [S.equal_width(build, n) for n in (15, 29, 30, 1000)] == [1, 1, 2, 66]
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="weights: got 14"):
        S.equal_width(build, 14)


@pytest.mark.filterwarnings("ignore::fastrobust.attacks.AttackWarning")
def test_study_trains_each_setting_and_leaves_the_model():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, 1, 8, 8, generator=g), torch.arange(24) % 3
    x[y == 1, :, :4] = 0
    x[y == 2, :, :, :4] = 0
    model, seen = net(), []

    def judge(trained):
        seen.append(sum(k.kept for k in S.kept_weights(trained).values()))
        with torch.no_grad():
            return float((trained.eval()(x).argmax(1) == y).float().mean())

    settings = S.grid([0.5, 0.9], [0.0, 1.0])
    assert settings[1] == {"rate": 0.5, "gamma": 1.0}
    method = fr.training.make("edge-popup", eps=0.02, steps=2)
    run = lambda: S.study(model, fr.training.loader(x, y, 8), settings, judge, epochs=6, method=method)  # noqa: E731
    found = unchanged(model, run)
    total = sum(m.weight.numel() for m in model if hasattr(m, "weight"))
    assert seen == [math.floor(total * 0.5)] * 2 + [math.floor(total / 10)] * 2
    assert found.shape == (4,) and found.max() > 0.6
    assert np.array_equal(found, run())
