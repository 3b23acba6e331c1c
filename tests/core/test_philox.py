"""Philox4x32-10 against the known-answer vectors of the Random123 distribution (Salmon et al. 2011, kat_vectors)."""

from __future__ import annotations

import math

import pytest
import torch

from fastrobust.reference import random as rnd

# counter, key, output
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_known_answers(counter, key, output) -> None:
    c, k, want = ([int(w, 16) for w in text.split()] for text in (counter, key, output))
    block = c[0] | c[1] << 32
    block -= 2**64 if block >= 2**63 else 0  # int64
    got = rnd.philox(k[0] | k[1] << 32, c[3], torch.tensor([c[2]]), torch.tensor([block]))
    assert [w.item() for w in got] == want


def test_words_are_numbered_by_example_and_element() -> None:
    all_words = rnd.words(5, 4, 11)
    assert all_words.shape == (4, 11)
    assert torch.equal(rnd.words(5, 2, 11, first_example=2), all_words[2:])
    assert torch.equal(rnd.words(5, 4, 7), all_words[:, :7])
    assert ((all_words >= 0) & (all_words < 2**32)).all()
    assert not torch.equal(rnd.words(5, 4, 11, stream=1), all_words)


def test_variates_have_their_ranges_and_moments() -> None:
    u = rnd.words(1, 50, 20000)
    half_open, opened = rnd.uniform(u), rnd.uniform_open(u)
    assert half_open.min() >= 0 and half_open.max() < 1 and opened.min() > 0 and opened.max() < 1
    edge = torch.tensor([0, 2**32 - 1])
    assert rnd.uniform(edge).tolist() == [0, 1 - 2.0**-24] and rnd.uniform_open(edge).tolist() == [
        2.0**-24,
        1 - 2.0**-24,
    ]
    spread = 5 / math.sqrt(u.numel())
    for t, variance in ((rnd.normals(u), 1.0), (rnd.laplace(u), 2.0)):
        assert abs(t.mean().item()) < spread * math.sqrt(variance)
        assert t.var().item() == pytest.approx(variance, rel=0.01)
