"""What a run says about its machine and its neighbours."""

import json
import os

import pytest
import torch

from fastrobust.benchmarks import metadata


def test_metadata_is_plain_data_and_says_what_ran():
    about = metadata.collect(torch.device("cpu"), "smoke")
    assert json.loads(json.dumps(about)) == about
    assert about["threads"] == torch.get_num_threads()
    assert about["torch"] == torch.__version__ and about["cpu"] and about["gpu"] is None
    assert about["cpus"] >= 1 and about["level"] == "smoke"
    assert about["libraries"]["numpy"]
    assert about["build"]["version"] == __import__("fastrobust").__version__


def test_busy_seconds_leaves_idle_and_waiting_out(tmp_path):
    path = tmp_path / "stat"
    path.write_text("cpu  100 10 50 99999 88888 5 15 20 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")
    assert metadata.busy_seconds(str(path)) == 200 / os.sysconf("SC_CLK_TCK")
    assert metadata.busy_seconds(str(tmp_path / "absent")) is None


@pytest.mark.parametrize(("others", "cpus"), [(0.0, 0.0), (15.0, 1.5)])
def test_neighbours_are_what_is_busy_beside_us(monkeypatch, others, cpus):
    now = {"wall": 100.0, "busy": 1000.0, "own": 50.0}
    monkeypatch.setattr(metadata.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(metadata, "busy_seconds", lambda: now["busy"])
    monkeypatch.setattr(metadata.os, "times", lambda: (now["own"], 0.0, 0.0, 0.0, 0.0))
    neighbours = metadata.Neighbours()
    now.update(wall=110.0, own=58.0, busy=1008.0 + others)
    assert neighbours.cpus() == cpus


def test_neighbours_of_a_system_that_does_not_say(monkeypatch):
    monkeypatch.setattr(metadata, "busy_seconds", lambda: None)
    assert metadata.Neighbours().cpus() is None
