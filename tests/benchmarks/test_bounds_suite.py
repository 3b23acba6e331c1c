"""Every kind of row of the bounds suite at its smallest size: ours runs, and the peers that are here compute the
same."""

import math

import pytest
import torch

from fastrobust.benchmarks import bounds, bounds_certificates, bounds_networks, harness
from fastrobust.benchmarks.case import Context


def test_the_suite_runs_and_agrees_with_its_peers():
    done = harness.run([bounds.SUITE], Context(level="smoke"))
    works = {row.work for row in done.rows}
    assert works >= {"IBP margins", "crown margins", "crown-ibp bounds and backward"}
    assert works >= {"fast-lin polyhedral_envelope", "crown-ibp envelope and backward"}
    networks = {row.axes["network"] for row in done.rows if "network" in row.axes}
    assert networks == set(bounds_networks.NETS)
    for row in done.rows:
        assert row.ours.status == harness.OK, (row.work, row.ours.reason)
        for peer in row.peers:
            assert peer.status in (harness.OK, harness.SKIPPED), (row.work, row.axes, peer.name, peer.reason)


def test_general_networks_have_every_method_in_full_and_the_quick_ones_by_default():
    full = list(bounds_networks.cases(Context(level="full")))
    usual = list(bounds_networks.cases(Context()))
    titles = [case.title for case in full]
    assert len(set(titles)) == len(titles) and {case.title for case in usual} < set(titles)
    assert {case.work for case in usual} == {"ibp margins", "crown-ibp margins"}
    barred = {case.axes["network"] for case in full if case.targets[0].at_least == 20.0}
    assert len(barred) == 4
    assert all(case.targets[0].at_least >= 1.0 for case in full)  # none slower than the peer


def test_looser_bounds_differ_and_tighter_ones_do_not():
    ours = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
    assert bounds_networks.never_looser(ours, ours - 1, 1e-4).agrees
    worse = ours.clone()
    worse[1, 0] += 0.5
    found = bounds_networks.never_looser(ours, worse, 1e-4)
    assert not found.agrees and found.difference == pytest.approx(0.5 / 4)


def test_other_work_must_be_finite_and_of_one_shape():
    a, b = torch.ones(2, 9), torch.zeros(2, 9)
    assert bounds_certificates.other_work(a, b, 0.0).agrees
    assert not bounds_certificates.other_work(a, b[:, :8], 0.0).agrees
    b[0, 0] = math.nan
    assert not bounds_certificates.other_work(a, b, 0.0).agrees
