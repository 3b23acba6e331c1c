"""explain says what the deciding code said, and ways forbids what it names; bounds stay the same."""

import threading

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.bounds import WAYS, compute_bounds, explain, ways
from fastrobust.bounds.decisions import allowed, recorded


def chain():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3)
    ).requires_grad_(False)  # fmt: skip


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(256, 3)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.b(h) + h).flatten(1))


X, Y = torch.linspace(0, 1, 3 * 2 * 64).view(3, 2, 8, 8), torch.tensor([0, 2, 1])


def test_each_network_and_method_takes_its_way():
    assert explain(chain(), X, method="ibp", labels=Y).way == "one call"
    assert explain(chain(), X, method="crown-ibp", labels=Y).way == "graph op"
    found = explain(Shortcut().requires_grad_(False), X, method="crown-ibp", labels=Y)
    assert found.way == "graph op"
    assert not found.declined
    assert {step.kind for step in found.steps} >= {"input", "conv", "relu", "sum", "dense"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounding": "outward"}, "outward rounding goes node by node"),
        ({"return_intermediate": True}, "return_intermediate asks for the hidden bounds"),
        ({"max_memory": 1 << 12}, "exceed max_memory"),
    ],
)
def test_what_ended_a_faster_way_is_said(options, said):
    found = explain(chain(), X, method="crown-ibp", labels=Y, **options)
    assert found.way == "walk"
    assert any(said in why for _, why in found.declined), found.declined


def test_rows_of_the_walk_say_how_they_reached_the_input():
    with ways(without=("graph op", "image kernel")):
        found = explain(chain(), X, 0.05, method="crown", labels=Y, refine="all")
    taken = {step.number: step.rows for step in found.steps if step.rows}
    last = found.steps[-1]
    assert taken[last.number], "the output's rows took some way"
    assert not any("image kernel" in row for rows in taken.values() for row in rows)
    with ways("walk"):
        alone = explain(chain(), X, 0.05, method="crown", labels=Y, refine="all")
    assert {row for step in alone.steps for row in step.rows} == {"walk"}


def test_the_text_is_a_table_of_every_node():
    found = explain(Shortcut().requires_grad_(False), X, method="crown", labels=Y)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"crown: {found.way} (")
    for way, why in found.declined:
        assert f"  not {way}: {why}" in lines
    rows = lines[2 + len(found.declined) :]
    assert [int(line.split()[0]) for line in rows] == [step.number for step in found.steps]
    assert lines[1 + len(found.declined)].split() == ["node", "kind", "shape", "reads", "where", "its", "rows"]


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "fast-lin", "crown"])
@pytest.mark.parametrize("make", [chain, lambda: Shortcut().requires_grad_(False)])
def test_bounds_are_the_same_without_a_way(method, make):
    net = make()
    want = compute_bounds(net, X, 0.02, method=method, labels=Y)
    for name in WAYS:
        with ways(without=name):
            got = compute_bounds(net, X, 0.02, method=method, labels=Y)
            assert name == "walk" or explain(net, X, 0.02, method=method, labels=Y).way != name
        scale = want.lower.abs().max()
        assert (got.lower - want.lower).abs().max() <= 1e-5 * scale, name
        assert (got.upper - want.upper).abs().max() <= 1e-5 * scale, name


def test_ways_add_up_end_and_hold_for_their_thread():
    with ways(without="image kernel"):
        with ways(without=["graph op"]):
            assert not allowed("image kernel") and not allowed("graph op") and allowed("living layers")
            seen = []
            thread = threading.Thread(target=lambda: seen.append(allowed("image kernel")))
            thread.start()
            thread.join()
            assert seen == [True]
        assert allowed("graph op") and not allowed("image kernel")
    with pytest.raises(KeyError), ways("walk"):
        raise KeyError
    assert all(allowed(name) for name in WAYS)
    with ways("image kernel"):
        assert allowed("image kernel") and allowed("walk") and not allowed("graph op")


def test_unknown_ways_are_named():
    with pytest.raises(ValueError, match="ways: got 'engine', expected some of 'one call'"), ways("engine"):
        pass
    with pytest.raises(ValueError, match="got 'fast'"), ways(without=["fast"]):
        pass


def test_nothing_is_recorded_outside_and_errors_are_those_of_the_bounds():
    with recorded() as log:
        compute_bounds(chain(), X, 0.01, labels=Y)
    count = len(log)
    assert count
    compute_bounds(chain(), X, 0.01, labels=Y)
    assert len(log) == count
    with pytest.raises(ValueError, match="method"):
        fr.bounds.explain(chain(), X, method="deeppoly", labels=Y)
