import numpy as np
import pytest
import torch

from fastrobust.analysis import _topics_training as topics


@pytest.mark.filterwarnings("ignore::fastrobust.attacks.AttackWarning")
@pytest.mark.parametrize("name", ["difficulty", "theory"])
def test_topics_answer_arrays_and_draw_without_touching_random_numbers(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    monkeypatch.setattr(topics, "_EPOCHS", 1)
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = 0.5 * torch.rand(60, 1, 8, 8, generator=g) + 0.5 * labels.view(-1, 1, 1, 1)
    state = torch.get_rng_state()
    arrays, draw = topics.TOPICS[name](images, labels, 0)
    assert torch.equal(state, torch.get_rng_state())
    again, _ = topics.TOPICS[name](images, labels, 0)
    assert arrays.keys() == again.keys()
    for key in arrays:
        np.testing.assert_array_equal(arrays[key], again[key])
    np.savez(tmp_path / "found.npz", **arrays)
    draw(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    if name == "theory":
        assert arrays["margins"].min() > -1e-8
    else:
        assert arrays["difficulty"].shape == (60,) and arrays["d_distance"].shape == (3, 3)
    with pytest.raises(ValueError, match="images: got shape"):
        topics._shape(images[0])
