"""Epochs of training at their smallest size: everybody ends with the same weights, and what would not is told apart."""

import math

from fastrobust.benchmarks import harness, training
from fastrobust.benchmarks.case import Context
from fastrobust.training import adversarial


def test_the_suite_runs_and_agrees_with_its_peers():
    done = harness.run([training.SUITE], Context(level="smoke"))
    assert [row.work for row in done.rows] == [
        "PGD-2", "FGSM-RS", "TRADES-2", "ibp worst case", "crown-ibp worst case"
    ]  # fmt: skip
    for row in done.rows:
        assert row.ours.status == harness.OK, row.ours.reason
        for peer in row.peers:
            assert peer.status == harness.OK or (peer.name == training.PEER and peer.status == harness.SKIPPED), peer
        if row.floor is None:
            assert row.ours.passes is None
            continue
        steps = 1 if row.work == "FGSM-RS" else 2
        images = 8  # two batches of four
        theirs = row.peers[0].passes
        assert row.ours.passes.backwards == theirs.backwards == images * (steps + 1 + (row.work[0] == "T"))
        assert images * (steps + 1) <= row.ours.passes.forwards <= theirs.forwards + images


def test_another_attack_is_told_apart():
    found = training.problem(Context(level="smoke"))
    given = lambda: found
    one, two = (
        training.candidate("x", given, training.ours(lambda n=n: adversarial.PGD(training.EPS, steps=n))).build()()
        for n in (1, 2)
    )
    one, two = ([t.clone() for t in w] for w in (one, two))
    compare = training.same_weights(given)
    assert compare(two, two, training.APART).agrees
    assert not compare(one, two, training.APART).agrees
    start = [p.detach() for p in given()[0].parameters()]
    assert compare(start, two, training.APART).difference == math.inf
