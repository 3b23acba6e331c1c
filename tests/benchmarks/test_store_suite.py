"""The store's suite at its smallest size, and the comparison of fast training on a handful of images."""

import json

import pytest
import torch

from fastrobust.benchmarks import fast_training, harness, store
from fastrobust.benchmarks.case import Context


def test_the_suite_runs_and_agrees_with_its_peers():
    done = harness.run([store.SUITE], Context(level="smoke"))
    assert {row.work for row in done.rows} == {"shift_flip", "store_gather", "store_scatter"}
    for row in done.rows:
        assert row.ours.status == harness.OK, (row.work, row.ours.reason)
        for peer in row.peers:
            assert peer.status == harness.OK, (row.work, row.axes, peer.name, peer.reason)


def test_fast_training_writes_a_table_and_a_picture(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    options = ["--images", "64", "--test-images", "10", "--batch", "32", "--epochs", "2", "--seeds", "1"]
    fast_training.main([*options, "--methods", "atas", "fgsm-rs", "unheard-of", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "fast-training-digits.json").read_text())
    assert set(report["rows"]) == {"atas", "fgsm-rs"} and report["missing"] == ["unheard-of"]
    assert set(report["rows"]["atas"][0]) == {"seed", "seconds", "clean", "pgd-50", "autoattack-fast"}
    assert (tmp_path / "fast-training-digits.png").stat().st_size > 1000
    assert "48.18 / 45.38" in capsys.readouterr().out


def test_the_same_seed_trains_the_same_model():
    data = fast_training.images_of.Images(torch.rand(64, 1, 8, 8), torch.randint(0, 10, (64,)), "noise")
    models = [fast_training.train("atas", fast_training.TASKS["digits"], data, 2, 32, 1)[0] for _ in range(2)]
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
