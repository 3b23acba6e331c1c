"""Every kind of row of the bounds suite at its smallest size: ours runs, and the peers that are here compute the same."""

from fastrobust.benchmarks import bounds, harness
from fastrobust.benchmarks.case import Context


def test_the_suite_runs_and_agrees_with_its_peers():
    done = harness.run([bounds.SUITE], Context(level="smoke"))
    assert {row.work for row in done.rows} >= {"IBP margins", "crown margins", "crown-ibp bounds and backward"}
    for row in done.rows:
        assert row.ours.status == harness.OK, (row.work, row.ours.reason)
        for peer in row.peers:
            assert peer.status in (harness.OK, harness.SKIPPED), (row.work, row.axes, peer.name, peer.reason)
