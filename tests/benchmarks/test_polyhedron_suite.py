"""Every row of the polyhedron suite at its smallest size: ours runs, and the peers compute the same."""

from fastrobust.benchmarks import harness, polyhedron
from fastrobust.benchmarks.case import Context


def test_the_suite_runs_and_agrees_with_its_peers():
    done = harness.run([polyhedron.SUITE], Context(level="smoke"))
    assert {row.work for row in done.rows} == {"polyhedral_distance", "polyhedral_envelope"}
    for row in done.rows:
        assert row.ours.status == harness.OK, (row.work, row.ours.reason)
        assert row.peers
        for peer in row.peers:
            assert peer.status == harness.OK, (row.work, row.axes, peer.name, peer.reason)
