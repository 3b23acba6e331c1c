"""Certified training: the way others compute a step, and the page of trained networks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import fastrobust as fr
from fastrobust.benchmarks import certified_page, certified_speed
from fastrobust.benchmarks import thesis_tables as thesis


def test_the_thesis_way_is_the_same_envelope() -> None:
    torch.manual_seed(0)
    model = certified_speed.fc1(12).double()
    x, eps = torch.rand(5, 1, 28, 28, dtype=torch.float64), 0.03
    with torch.no_grad():
        y = model(x).argmax(1)  # margins are positive at x: both distances are plain ones
        others = torch.stack([torch.tensor([j for j in range(10) if j != c]) for c in y.tolist()])
        U, p = certified_speed.materialised(model, x, y, eps)
        bounds = fr.bounds.compute_bounds(
            model, x, eps, clip=(0, 1), method="fast-lin", labels=y, sides="lower", return_linear=True
        )
        theirs = U[torch.arange(5)[:, None], others]
        torch.testing.assert_close(theirs, bounds.linear.lower_A.flatten(2))
        torch.testing.assert_close(p[torch.arange(5)[:, None], others], bounds.linear.lower_b)
        found = fr.certify.polyhedral_envelope(model, x, y, eps, clip=(0, 1), signed=True).distances
        distances = certified_speed.passes(U, p, x)[torch.arange(5)[:, None], others]
        near = found.isfinite() & (found > 0) & (found < 0.5)
        assert int(near.sum()) > 5
        torch.testing.assert_close(distances[near], found[near], rtol=1e-3, atol=1e-5)
        model.float()
        ours = certified_speed.envelope("fast-lin", eps)(model, x.float(), y)
        assert float(ours) == pytest.approx(float(certified_speed.thesis_loss(model, x.float(), y, eps)), rel=0.05)


def test_rows_have_bars() -> None:
    rows = certified_speed.rows([""])
    assert [r[0] for r in rows] == [
        "l-per fc1", "i-per fc1", "ibp fc1", "ibp cnn", "crown-ibp fc1", "crown-ibp cnn"
    ] and [r[4] for r in rows] == [10, 10, 3, 3, 3, 3]  # fmt: skip
    batches = [(torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3]))] * 2
    found = certified_speed.measure(lambda: certified_speed.fc1(8), rows[0][2], rows[0][3], batches, 2)
    assert found["ratio"] > 0 and found["ours_ms"] > 0 and math.isfinite(found["apart"])


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = dict(zip(thesis.COLUMNS, (2.0, 9.0, 15.0, 80.0, None, 0.085, 0.02, 0.09), strict=True))
    printed = dict(zip(thesis.COLUMNS, thesis.printed("fc1", "Linf", "kw"), strict=True))
    row = {
        "key": "kw", "method": "kw", "network": "fc1", "norm": "Linf", "eps": 0.1, "epochs": 5, "train_images": 60000,
        "test_images": 10000, "seconds": 50.0, "ours": ours, "printed": printed,
        "run": {"cpu": "some CPU", "threads": 1, "date": "2026-02-03T00:00:00", "others": 1.5},
    }  # fmt: skip
    file, page = tmp_path / "t.json", tmp_path / "page.md"
    file.write_text(json.dumps({"rows": [row]}))
    page.write_text("a\n<!-- certified: begin -->\n<!-- certified: end -->\nb\n")
    assert certified_page.main([str(file), "--into", str(page)]) == 0
    text = page.read_text()
    assert (
        "| FC1 kw, l-inf 0.1 | 5 | 2.00 / 2.26 | 9.00 / 8.59 | 15.00 / 12.91 | 80.00 / 69.20 | 0.0850 / 0.0871 |"
        in text
    )
    assert "CRE MIP" not in text and text.endswith("b\n") and "| 10 |" in text
    file.write_text(json.dumps({"rows": []}))
    assert certified_page.main([str(file)]) == 2 and "expected some" in capsys.readouterr().err
