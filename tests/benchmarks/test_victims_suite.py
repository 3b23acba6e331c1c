"""The suite of prepared victims at its smallest size."""

import pytest

from fastrobust.benchmarks import harness, victims
from fastrobust.benchmarks.case import Context


def test_the_suite_runs_and_agrees_with_its_peers():
    pytest.importorskip("torchattacks")
    done = harness.run([victims.SUITE], Context(level="smoke"))
    assert [row.axes["network"] for row in done.rows] == list(victims.ROWS)
    for row in done.rows:
        assert row.ours.status == harness.OK, (row.axes, row.ours.reason)
        assert [peer.name for peer in row.peers] == [victims.UNPREPARED, victims.PEER]
        for peer in row.peers:
            assert peer.status == harness.OK, (row.axes, peer.name, peer.reason)
