"""One row from equality to verdicts, with stand-ins for ours and the peers, and a clock that believes what they say."""

import pytest
import torch

from fastrobust.benchmarks import floors, harness, metadata, timing
from fastrobust.benchmarks.case import (
    BEST_PEER,
    FLOOR,
    OURS,
    Candidate,
    Case,
    Context,
    Floor,
    Suite,
    Target,
    Unavailable,
)

CONTEXT = Context(level="smoke")
MACHINE = floors.Machine(torch.device("cpu"), 1, copy_bandwidth=1e9, matrix_rate=1e9)
EFFORT = timing.Effort(0.01, rounds=3, least=3, sample_seconds=0.0)


class FakeClock:
    """The seconds a call claims to take; a copy takes a nanosecond a byte of its target."""

    def sample(self, call, repeats):
        value = call()
        return call.seconds if hasattr(call, "seconds") else value.nbytes * 1e-9 if value is not None else 1.0


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch):
    monkeypatch.setattr(timing, "clock_for", lambda device: FakeClock())
    monkeypatch.setattr(metadata.Neighbours, "cpus", lambda self: 0.05)


def takes(milliseconds, value):
    """A candidate's build: the call claims that time and returns the value."""

    def call():
        return value

    call.seconds = milliseconds * 1e-3
    return lambda: call


def case(*peers, ours=None, **keywords):
    ours = ours or Candidate(OURS, takes(2, torch.zeros(3)))
    return Case("work", {"size": 3}, ours, tuple(peers), **keywords)


def run(one, suite="stand-in"):
    return harness.run_case(suite, one, CONTEXT, MACHINE, EFFORT)


def missing(reason):
    def build():
        raise Unavailable(reason)

    return build


def broken(error):
    def build():
        raise error

    return build


def test_ratios_are_peer_over_ours():
    row = run(case(Candidate("slow", takes(8, torch.zeros(3))), Candidate("fast", takes(1, torch.zeros(3)))))
    slow, fast = row.peers
    assert row.ours.status == slow.status == fast.status == harness.OK
    assert slow.ratio.median == pytest.approx(4.0)
    assert fast.ratio.median == pytest.approx(0.5)
    assert row.ours.ratio is None and row.ours.seconds.median == pytest.approx(2e-3)
    assert row.ours.samples == slow.samples == 3
    assert row.best_peer is fast


def test_a_missing_peer_is_skipped_with_its_reason_and_the_others_run():
    row = run(case(Candidate("absent", missing("not installed")), Candidate("present", takes(1, torch.zeros(3)))))
    absent, present = row.peers
    assert (absent.status, absent.reason) == (harness.SKIPPED, "not installed")
    assert absent.ratio is None and absent.seconds is None
    assert present.status == harness.OK


def test_a_broken_peer_is_marked_and_the_others_run():
    row = run(
        case(
            Candidate("broken", broken(TypeError("unexpected\n  keyword"))),
            Candidate("raises", lambda: broken(RuntimeError("late"))),
            Candidate("present", takes(1, torch.zeros(3))),
        )
    )
    assert [peer.status for peer in row.peers] == [harness.FAILED, harness.FAILED, harness.OK]
    assert row.peers[0].reason == "TypeError: unexpected keyword"
    assert row.peers[1].reason == "RuntimeError: late"


def test_a_peer_that_differs_is_timed_but_is_no_best_peer_and_meets_no_target():
    row = run(
        case(
            Candidate("wrong", takes(1, torch.full((3,), 0.5))),
            Candidate("right", takes(4, torch.full((3,), 0.05))),
            tolerance=0.1,
            targets=(Target("wrong", 0.0), Target(BEST_PEER, 1.2)),
        )
    )
    wrong, right = row.peers
    assert wrong.status == harness.DIFFERS and wrong.agreement.difference == 0.5
    assert wrong.ratio is not None
    assert right.status == harness.OK and right.agreement.difference == pytest.approx(0.05)
    assert row.best_peer is right
    assert [verdict.verdict for verdict in row.verdicts] == [harness.NOT_JUDGED, harness.MET]


def test_results_are_compared_before_a_shared_buffer_is_overwritten():
    out = torch.zeros(3)

    def fills(value):
        return lambda: lambda: out.fill_(value)

    row = run(case(Candidate("peer", fills(5.0)), ours=Candidate(OURS, fills(1.0))))
    assert row.peers[0].agreement.difference == 4.0


def test_the_case_decides_what_equal_means():
    from fastrobust.benchmarks.case import Agreement

    def same_shape(ours, theirs, tolerance):
        return Agreement(0.0, ours.shape == theirs.shape, "shape")

    row = run(
        case(
            Candidate("a", takes(1, torch.ones(3))),
            Candidate("b", takes(1, torch.ones(4))),
            compare=same_shape,
        )
    )
    assert [peer.status for peer in row.peers] == [harness.OK, harness.DIFFERS]


def test_targets():
    row = run(
        case(
            Candidate("peer", takes(8, torch.zeros(3))),
            Candidate("absent", missing("gone")),
            floor=Floor(part=takes(1, None), part_name="part"),
            targets=(
                Target("peer", 1.5),
                Target("peer", 50.0),
                Target("absent", 1.0),
                Target(BEST_PEER, 1.5),
                Target(FLOOR, 0.2),
                Target(FLOOR, 0.99),
            ),
        )
    )
    assert [verdict.verdict for verdict in row.verdicts] == [
        harness.MET,
        harness.MISSED,
        harness.NOT_JUDGED,
        harness.MET,
        harness.MET,
        harness.MISSED,
    ]
    assert row.floor.kind == "part"
    assert row.floor.fraction.median == pytest.approx(0.5)


def test_a_heavier_row_is_sampled_longer():
    effort = timing.Effort(0.02, rounds=100, least=3, sample_seconds=0.0)
    light, heavy = (
        harness.run_case("s", case(weight=weight), CONTEXT, MACHINE, effort).ours.samples for weight in (1.0, 4.0)
    )
    assert (light, heavy) == (5, 20)  # 2 ms a call and as much for the warm-up before it


def test_the_floor_is_the_largest_bound():
    # 1e6 operations at 1e9 a second take 1 ms, the copy of 8 kB 4 us, the part 0.2 ms; ours takes 2 ms
    row = run(case(floor=Floor(bytes=8000, flops=1_000_000, part=takes(0.2, None))))
    assert row.floor.kind == "matrix"
    assert row.floor.seconds == pytest.approx(1e-3)
    assert row.floor.fraction.median == pytest.approx(0.5)
    row = run(case(floor=Floor(bytes=3_200_000, flops=1_000_000, part=takes(0.2, None))))
    assert row.floor.kind == "copy"
    assert row.floor.seconds == pytest.approx(1.6e-3)
    assert row.floor.where == floors.memory_level(3_200_000, torch.device("cpu"), 1)
    row = run(case(floor=Floor(bytes=8000, part=takes(1.8, None), part_name="model")))
    assert row.floor.kind == "model"
    assert row.floor.fraction.median == pytest.approx(0.9)
    assert run(case()).floor is None


def test_ours_failing_fails_the_row_and_its_targets():
    row = run(case(ours=Candidate(OURS, broken(ValueError("eps is -1"))), targets=(Target("peer", 1.0),)))
    assert row.ours.status == harness.FAILED
    assert row.ours.reason == "ValueError: eps is -1"
    assert [verdict.verdict for verdict in row.verdicts] == [harness.MISSED]
    assert row.peers == [] and row.floor is None


def test_ours_missing_its_data_skips_the_row_without_a_verdict():
    row = run(case(ours=Candidate(OURS, missing("needs --data")), targets=(Target("peer", 1.0),)))
    assert row.ours.status == harness.SKIPPED
    assert row.verdicts == []


class Bar:
    def __init__(self):
        self.seen, self.closed = [], False

    def set_description_str(self, desc):
        self.seen.append(desc.strip())

    def update(self, n=1):
        self.seen.append(n)

    def close(self):
        self.closed = True


def test_a_run_goes_through_the_suites_and_says_what_was_left_out():
    absent = Candidate("absent", missing("not installed"))

    def cases(context):
        assert context is CONTEXT
        yield case(absent)
        yield case(absent, Candidate("wrong", takes(1, torch.ones(3))))

    def unavailable(context):
        raise Unavailable("needs --data")

    bars = []

    def bar(rows):
        assert rows == 2
        bars.append(Bar())
        return bars[-1]

    done = harness.run([Suite("one", cases, ""), Suite("two", unavailable, "")], CONTEXT, bar)
    assert [row.suite for row in done.rows] == ["one", "one"]
    assert done.notes == [
        "two: skipped: needs --data",
        "one: absent skipped: not installed",
        "one: work 3: wrong differs from ours by 1 (max abs; tolerance 0); its ratio does not count",
    ]
    assert bars[0].seen == ["one: work 3", 1, "one: work 3", 1]
    assert bars[0].closed
    assert done.metadata["threads"] == torch.get_num_threads()
    assert done.machine.copy_bandwidth > 0


def test_busy_neighbours_are_noted(monkeypatch):
    monkeypatch.setattr(metadata.Neighbours, "cpus", lambda self: 1.25)
    done = harness.run([Suite("s", lambda context: [case()], "")], CONTEXT)
    assert done.metadata["others"] == 1.25
    assert done.notes == ["other processes used 1.2 CPUs during the run: the figures are not to be relied on"]


def test_problems_name_missed_targets_differences_and_failures():
    def cases(context):
        yield case(Candidate("fast", takes(1, torch.zeros(3))), targets=(Target("fast", 3.0),))
        yield case(Candidate("wrong", takes(1, torch.ones(3))))
        yield case(ours=Candidate(OURS, broken(ValueError("bad"))))
        yield case(Candidate("slow", takes(8, torch.zeros(3))), targets=(Target("slow", 1.0),))

    done = harness.run([Suite("s", cases, "")], CONTEXT)
    found = harness.problems(done)
    assert len(found) == 3
    assert found[0].startswith("s: work 3: 0.") and found[0].endswith("against fast, target 3")
    assert found[1] == "s: work 3: wrong differs by 1"
    assert found[2] == "s: work 3: ValueError: bad"
