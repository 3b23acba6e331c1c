import numpy as np
import pytest
import torch

from benchmarks import gallery_claims
from fastrobust.analysis import _topics, _topics_dynamic, _topics_overfitting, _topics_schedules, _topics_small
from fastrobust.analysis import _topics_training as topics
from fastrobust.analysis import _topics_weights as weighed
from fastrobust.cli import analyse

SMALL = {  # as little as runs
    _topics: {"_UPDATES": 10},
    topics: {"_EPOCHS": 1, "_NOISE": (60, 150)},
    _topics_dynamic: {"_EPOCHS": 2, "_STEPS": 1, "_BUDGETS": (0.05, 0.1)},
    _topics_overfitting: {"_EPOCHS": 2, "_STEPS": 1},
    _topics_schedules: {
        "_EPOCHS": 2,
        "_STEPS": 1,
        "_RATES": (1e-3, 3e-3),
        "_WIDTHS": (2, 4),
        "_WANG_EPOCHS": 1,
        "_COUNTS": (1, 2, 3),
    },
    weighed: {"_EPOCHS": 10, "_STEPS": 1, "_WARM_UP": 2},
    _topics_small: {
        "_EPOCHS": 1,
        "_STEPS": 1,
        "_RANGES": (0.01, 0.01),
        "_WIDTHS": (4, 8),
        "_DESCENT": 2,
        "_GAME_STEPS": (8,),
    },
}


def test_the_command_knows_all():
    known = analyse.topics()
    assert set(known) == {
        "trajectory",
        "early",
        "landscape",
        "fosc",
        "dynamic",
        "steps",
        "schedules",
        "weights",
        "corruptions",
        "difficulty",
        "overfitting",
        "subnetwork",
        "initialisation",
        "theory",
        "convergence",
        "overparametrized",
    }
    assert all(topic.__doc__ for topic in known.values())


@pytest.mark.filterwarnings("ignore::fastrobust.attacks.AttackWarning")
@pytest.mark.parametrize(
    "name",
    [
        "early",
        "dynamic",
        "steps",
        "schedules",
        "overfitting",
        "weights",
        "corruptions",
        "initialisation",
        "convergence",
        "overparametrized",
    ],
)
def test_each_is_what_it_says(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for module, values in SMALL.items():
        for key, value in values.items():
            monkeypatch.setattr(module, key, value)
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) // 2 % 2  # every fourth is held out
    images = 0.5 * torch.rand(60, 1, 8, 8, generator=g) + 0.5 * labels.view(-1, 1, 1, 1)
    state = torch.get_rng_state()
    with torch.random.fork_rng():  # as the command does
        arrays, draw = analyse.topics()[name](images, labels, 0)
    assert torch.equal(state, torch.get_rng_state())
    np.savez(tmp_path / "found.npz", **arrays)
    draw(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    small = {key: np.asarray(value) for key, value in arrays.items() if np.size(value) <= analyse._SMALL}
    for claim in gallery_claims.STUDIES[name].claims:  # the page has its numbers from the JSON file
        held, numbers = claim.check(small)
        assert held in (True, False, None) and numbers
    if name == "early":
        assert arrays["norms"].shape == (4, 10) and (np.diff(arrays["distances"][:, :3]) > 0).all()
    elif name == "dynamic":
        assert arrays["fosc"].shape == (4, 2, 45) and (arrays["fosc"] >= 0).all()
        assert arrays["robust_accuracy"].shape == (4, 2) and arrays["robust_accuracy_trained_at"].shape == (3, 2)
    elif name == "overfitting":
        assert arrays["curves"].shape[:2] == (5, 3) and (arrays["lipschitz"] > 0).all()
        d = arrays["shown_difficulty"].reshape(2, 2, 3)  # of two classes, the easiest and the hardest
        assert (d[:, 0] > d[:, 1]).all() and arrays["group_activations"].shape == (2, 10)
    elif name == "initialisation":
        table = arrays["by_init"]
        assert arrays["plain_by_init"].shape == (2, 2, 2)
        assert table.shape == (2, 2, 2) and np.isfinite(table).all() and arrays["curves"].shape == (2, 2, 1)
        np.testing.assert_array_equal(table[:, 1, 0], arrays["by_range"][:, 1])  # binary, gamma 0.1, range 0.01
        np.testing.assert_array_equal(arrays["curves"][..., -1], arrays["by_range"])
    elif name == "steps":
        assert arrays["accuracy_by_step"].shape == (5, 3) and arrays["accuracy_by_steps"].shape == (3, 3)
        assert (arrays["accuracy_by_step"][:, 0] >= arrays["accuracy_by_step"][:, 1] - 0.2).all()
    elif name == "schedules":
        np.testing.assert_array_equal(arrays["error_by_width"][:, 1], arrays["error_by_rate"][:, 1])
        theta, eps = arrays["sketch_theta"], arrays["sketch_eps"]
        inputs = np.linspace(-1, 1, 201)  # the worst of many, not the formula
        brute = np.logaddexp(0, theta[None, :, None] * (1 + eps[:, None, None] * inputs)).max(-1)
        np.testing.assert_allclose(arrays["sketch_loss"], brute, atol=1e-12)
        assert (arrays["eps_by_progress"][:, 0] == 0).all() and (np.diff(arrays["eps_by_progress"]) >= 0).all()
    elif name == "weights":
        assert arrays["curves"].shape == (6, 10, 3) and np.isclose(arrays["weight"].mean(), 1)
        assert (arrays["label_share"] >= 0.1).all() and (arrays["label_share"] <= 1).all()
        np.testing.assert_array_equal(arrays["curves"][0], arrays["curves"][-1])  # beta 1 is ATTA
    elif name == "corruptions":
        assert arrays["d_distance"].shape == (3, 18) and (arrays["d_distance"] <= 0.5).all()
        np.testing.assert_allclose(arrays["between_methods"], arrays["between_methods"].T)
    elif name == "convergence":
        assert (arrays["derived_bound"] >= arrays["regret"]).all()
    else:
        assert arrays["shattered"][:, 2].tolist() == [3, 8, 12, 32] and np.isfinite(arrays["loss"]).all()


@pytest.mark.filterwarnings("ignore::fastrobust.attacks.AttackWarning")
@pytest.mark.parametrize("name", ["difficulty", "theory"])
def test_topics_answer_arrays_and_draw_without_touching_random_numbers(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    for key, value in SMALL[topics].items():
        monkeypatch.setattr(topics, key, value)
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
