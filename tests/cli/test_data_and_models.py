"""The data sets and the reference models behind the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastrobust import data, models


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_digits_split() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="the digits need scikit-learn")
    train, test = data.load("digits", "train"), data.load("digits")
    assert train.images.shape == (1347, 1, 8, 8) and test.images.shape == (450, 1, 8, 8)
    assert test.images.dtype == torch.float32 and test.labels.dtype == torch.int64
    assert test.images.min() == 0 and test.images.max() == 1
    raw = sklearn.load_digits()
    assert np.array_equal(test.images[1, 0].numpy() * 16, raw.images[4]) and test.labels[1] == raw.target[4]
    assert sorted(torch.cat([train.labels, test.labels]).tolist()) == sorted(raw.target.tolist())
    assert len(data.load("digits", limit=7).labels) == 7


def test_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.arange(2 * 28 * 28).reshape(2, 28, 28).astype(np.uint8)
    labels = np.array([3, 9], np.uint8)
    save(tmp_path / "mnist.npz", train_images=grey[:1], train_labels=labels[:1], test_images=grey, test_labels=labels)
    monkeypatch.setenv("FASTROBUST_DATA", str(tmp_path))
    test = data.load("mnist")
    assert test.images.shape == (2, 1, 28, 28) and test.labels.tolist() == [3, 9] and test.labels.dtype == torch.int64
    assert torch.equal(test.images[:, 0], torch.from_numpy(grey).float() / 255)
    assert len(data.load("mnist", "train").labels) == 1 and data.load(tmp_path / "mnist.npz").images.shape[0] == 2
    with pytest.raises(FileNotFoundError, match=r"cifar10_subset\.npz"):
        data.load("cifar10")
    monkeypatch.delenv("FASTROBUST_DATA")
    with pytest.raises(FileNotFoundError, match="FASTROBUST_DATA"):
        data.load("mnist")


@pytest.mark.data
def test_the_real_archives(data_dir: Path) -> None:
    assert data.load("mnist", folder=data_dir).images.shape == (10000, 1, 28, 28)
    assert data.load("mnist", "train", folder=data_dir, limit=50).images.shape == (50, 1, 28, 28)
    assert data.load("cifar10", folder=data_dir).images.shape == (846, 3, 32, 32)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 4), np.float32)}, "labels"),
        ({"z": np.zeros(2)}, "images and no labels"),
        ({"x": np.zeros((2, 4), np.float32)}, "no y"),
        ({"test_images": np.zeros((2, 4), np.float32)}, "test_labels"),
        ({"images": np.zeros((2, 4), np.float32), "labels": np.zeros(3, int)}, r"shape \(2,\)"),
        ({"images": np.zeros((2, 4), np.float32), "labels": np.zeros(2)}, "float64"),
        ({"images": np.zeros((2, 4), np.float32), "labels": np.array([-1, 0])}, "-1"),
        ({"images": np.zeros((2, 4), np.int32), "labels": np.zeros(2, int)}, "int32"),
        ({"images": np.full((2, 4), 1.5), "labels": np.zeros(2, int)}, r"\[0, 1\]"),
        ({"images": np.full((2, 4), np.nan), "labels": np.zeros(2, int)}, r"\[0, 1\]"),
        ({"images": np.zeros(2), "labels": np.zeros(2, int)}, "shape"),
        ({"images": np.zeros((0, 4)), "labels": np.zeros(0, int)}, "shape"),
        ({"images": np.array([[None]]), "labels": np.zeros(1, int)}, "not a readable npz"),
    ],
)
def test_malformed_files(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        data.load(save(tmp_path / "a.npz", **arrays))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="not an npz"):
        data.load(tmp_path / "a.npz")
    whole = save(tmp_path / "b.npz", images=np.zeros((40, 9), np.float32), labels=np.zeros(40, int)).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.npz"):
        data.load(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("model", "shape", "count"), [(models.digits_cnn, (3, 1, 8, 8), 41866), (models.mnist_cnn, (3, 1, 28, 28), 166406)]
)
def test_shapes(model: object, shape: tuple[int, ...], count: int) -> None:
    made = model()  # type: ignore[operator]
    assert made(torch.rand(shape)).shape == (3, 10) and sum(p.numel() for p in made.parameters()) == count


def test_training_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    monkeypatch.setattr(models, "_EPOCHS", 1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = models.train_digits(0, cache=False)
    assert torch.equal(torch.get_rng_state(), state) and not one.training
    torch.manual_seed(6)
    with torch.inference_mode():  # a caller's mode does not matter
        two, other = models.train_digits(0, cache=False), models.train_digits(1, cache=False)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) and a.grad is None and not b.is_inference()
    assert not torch.equal(one.get_parameter("0.weight"), other.get_parameter("0.weight"))


def test_the_trained_model_is_cached(
    digits_model: torch.nn.Module, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (cache / "digits_cnn-seed0.pt").is_file()
    monkeypatch.setattr(models, "_fit", lambda model, seed: None)  # the weights now come from the file alone
    again = models.train_digits(0)
    assert torch.equal(again.get_parameter("0.weight"), digits_model.get_parameter("0.weight"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kept", [b"junk", {"format": -1, "seed": 0, "state": {}}, {"state": 3}, [1, 2]])
def test_an_unusable_cache_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kept: object
) -> None:
    monkeypatch.setenv("FASTROBUST_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_fit", lambda model, seed: torch.nn.init.constant_(model[0].weight, 7.0))
    file = tmp_path / "digits_cnn-seed0.pt"
    if isinstance(kept, bytes):
        file.write_bytes(kept)
    else:
        torch.save(kept, file)
    assert (models.train_digits(0)[0].weight == 7).all()
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "training the digits model again" in err
    assert (models.train_digits(0)[0].weight == 7).all() and capsys.readouterr().err == ""
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTROBUST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(models, "_fit", lambda model, seed: None)
    models.train_digits(0)
    assert "not cached" in capsys.readouterr().err
