"""The gallery page is that of its file of numbers; pictures are small; what came out is told from what did not."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gallery, gallery_claims
from fastrobust.cli import analyse

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_written_from_the_numbers():
    results = json.loads(gallery.FILE.read_text())
    assert (DOCS / "gallery.md").read_text() == gallery.page(results)
    for name in results:
        assert 0 < (DOCS / f"pictures/{name}.png").stat().st_size <= 60_000, name


def test_every_study_has_its_claims():
    assert set(gallery_claims.STUDIES) == set(analyse.topics())
    assert all(study.claims for study in gallery_claims.STUDIES.values())


def test_a_section_counts_the_seeds_in_which_it_came_out():
    study = gallery_claims.Study(
        "About.", (gallery_claims.Claim("Figure 1", "a is above 1.", lambda a: (a["a"] > 1, str(a["a"]))),), 3
    )
    result = {"data": "digits", "images": 7, "seeds": {"0": {"a": 2}, "1": {"a": 0}, "2": {"a": 3}}}
    text = "\n".join(gallery.section("name", study, result))
    assert "7 images of digits, seeds 0, 1, 2" in text and "**In 2 of 3 seeds**: 2." in text
    result["seeds"] = {"0": {"a": 0}}
    assert "**Did not come out**: 0." in "\n".join(gallery.section("name", study, result))
    unknown = gallery_claims.Study("About.", (gallery_claims.Claim("Figure 1", "a.", lambda a: (None, "0.1")),))
    assert "**Within the error of so few images**: 0.1." in "\n".join(gallery.section("name", unknown, result))
    assert gallery_claims.above(0.01) is None and gallery_claims.above(0.2) and gallery_claims.above(-0.2) is False
    result["seeds"] = {"0": {"a": 5}}
    assert "**Came out**: 5." in "\n".join(gallery.section("name", study, result))


def test_claims_read_their_numbers():
    steps = {"steps": np.array([1, 2]), "regret": np.ones((2, 2, 2)), "bound": np.full((2, 2, 2), 2.0)}
    steps["regret"][0, 1, 1] = 3.0
    assert gallery_claims._printed(0, 0)(steps)[0] and not gallery_claims._printed(0, 1)(steps)[0]
    peaks = {"toy_peaks": np.array([[1.0, 1], [1, 2], [1, 5]])}
    assert gallery_claims._maxima(peaks)[0] and not gallery_claims._maxima({"toy_peaks": np.ones((3, 3))})[0]
    over = {"settings": np.array(["plain", "fgsm", "pgd 0.025", "pgd 0.1", "pgd l2 0.6"])}
    over |= {
        "last_test_error": np.array([[0.3, 0, 0.2]] * 3 + [[0.9, 0.5, 0.4]] * 2),
        "last_train_error": np.zeros((5, 3)),
    }
    assert (
        gallery_claims._hard_fails(over)[0] and gallery_claims._weaker(over)[0] and not gallery_claims._grows(over)[0]
    )


def test_a_study_that_ran_is_read_and_rounded(tmp_path):
    (tmp_path / "seed-0").mkdir()
    written = {"data": "digits", "images": 3, "arrays": {"a": [[1.23456, 2]], "b": "text"}}
    (tmp_path / "seed-0/theory.json").write_text(json.dumps(written))
    found = gallery.measure("theory", [0], tmp_path)
    assert found == {"seeds": {"0": {"a": [[1.235, 2]], "b": "text"}}, "data": "digits", "images": 3}


def test_shrink(tmp_path):
    images = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
    noise = np.random.default_rng(0).integers(0, 255, (150, 420, 3), dtype=np.uint8)
    images.fromarray(noise).save(tmp_path / "large.png")
    gallery.shrink(tmp_path / "large.png", tmp_path / "small.png", limit=30_000)
    assert (tmp_path / "small.png").stat().st_size <= 30_000
    with images.open(tmp_path / "small.png") as small:
        assert small.mode == "P" and abs(small.width / small.height - 2.8) < 0.05
