"""The suite of whole evaluations at its smallest size, and what its comparison calls the same."""

import math
import re

import pytest
import torch
from torch import nn

from fastrobust.benchmarks import attacks, harness, models
from fastrobust.benchmarks.case import Context, Unavailable
from fastrobust.benchmarks.peers import auto_attack


def test_the_suite_runs_and_agrees_with_its_peer():
    done = harness.run([attacks.SUITE], Context(level="smoke"), only=re.compile("^standard"))
    assert {(row.axes["norm"], row.axes["model"]) for row in done.rows} == {
        (norm, kind) for norm in ("Linf", "L2", "L1") for kind in ("plain", "PGD-trained")
    }
    for row in done.rows:
        assert row.ours.status == harness.OK, row.ours.reason
        (peer,) = row.peers
        assert peer.status in (harness.OK, harness.SKIPPED), (row.axes, peer.reason)
        if peer.status == harness.OK:
            assert "of 4 verdicts alike; forwards" in peer.agreement.measure


def test_rows_by_level():
    titles = lambda level: [t for case in attacks.cases(Context(level=level)) if " steps " not in (t := case.title)]
    quick, default = titles("quick"), titles("default")
    assert set(quick) < set(default) and "certify first Linf provably trained" in quick
    assert len(default) == 9 and set(default) < set(titles("full")) and len(titles("full")) == 25


def problem():
    return attacks.Problem(nn.Flatten(), torch.eye(4)[None].repeat(4, 1, 1)[:, :1] * 0.5, torch.tensor([0, 0, 0, 1]))


def result(adv, forwards=100):
    return {"adv": adv, "forwards": forwards, "backwards": 0}


def test_what_counts_as_the_same():
    _, x, _ = problem()
    compare = attacks.same_accuracy(problem, math.inf, 0.4)
    broken = x.clone()
    broken[0, 0, 0], broken[0, 0, 1] = 0.1, 0.4
    assert compare(result(x), result(x), 0.0).agrees
    off = compare(result(x), result(broken), 0.0)
    assert not off.agrees and off.difference == 25 and "75.0 % and 50.0 %, 3 of 4 verdicts alike" in off.measure
    assert compare(result(x), result(broken), 25.0).agrees
    assert compare(result(x), result(x + 0.41), 100).measure == "ball"
    assert compare(result(x), result(x - 0.1), 100).measure == "shape and box"
    fifth = attacks.same_accuracy(problem, math.inf, 0.4, 0.2)
    assert fifth(result(x, 20), result(x), 0).agrees and not fifth(result(x, 21), result(x), 0).agrees


def test_passes_are_counted():
    model = models.small_cnn()
    watch = auto_attack.Passes(model)
    x = torch.rand(3, 1, 28, 28, requires_grad=True)
    with torch.no_grad():
        model(x)
    model(x[:2]).sum().backward()
    assert (watch.forwards, watch.backwards) == (5, 2)
    watch.handle.remove()
    model(x)
    assert watch.forwards == 5


def test_without_data_rows_are_skipped(tmp_path):
    context = Context(level="quick", data=str(tmp_path))
    with pytest.raises(Unavailable, match="no mnist"):
        attacks.trained_problem(context, "mnist", False, 3)
    with pytest.raises(Unavailable, match="mnist_fc1_l1_kw"):
        attacks.published_problem(context, 3)
