"""The picture: which examples, how many panels, and a PNG in the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli_helpers import Run

pytest.importorskip("matplotlib", reason="pictures need matplotlib")
from fastrobust.cli import _picture as picture


@pytest.mark.parametrize(("channels", "columns"), [(1, 5), (3, 2), (1, 1)])
def test_panels(channels: int, columns: int) -> None:
    x = torch.rand(columns, channels, 6, 6)
    labels = torch.arange(columns)
    wrong = labels + 1
    figure = picture.draw(x, (x + 0.05).clamp(0, 1), labels, labels, wrong, "title")
    panels = [axes for axes in figure.axes if axes.get_label() != "scale"]
    assert len(panels) == picture.ROWS * columns
    assert len(figure.axes) - len(panels) == (1 if channels == 1 else 0)
    titles = {axes.get_title() for axes in panels}
    assert {f"true {i}" for i in range(columns)} <= titles and {f"says {i + 1}" for i in range(columns)} <= titles
    shown = panels[0].images[0].get_array()
    assert shown.shape[:2] == (6, 6)


def test_the_colours_of_a_perturbation_are_signed() -> None:
    x = torch.full((1, 1, 2, 2), 0.5)
    delta = torch.tensor([[[[0.1, -0.1], [0.0, 0.05]]]])
    figure = picture.draw(x, x + delta, *(torch.zeros(1, dtype=torch.int64) for _ in range(3)), "t")
    image = figure.axes[1].images[0]
    (up, down), (none, half) = (image.cmap(image.norm(row)) for row in image.get_array())
    assert up[0] > up[2] and down[2] > down[0] and min(none[:3]) > 0.95 and half[0] > half[2] and half[2] > up[2]


def test_fallen_examples_come_first_and_classes_alternate() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    after = torch.tensor([1, 1, 0, 0, 1, 2])
    assert picture.pick(labels, labels, after, 2).tolist() == [0, 3]
    assert picture.pick(labels, labels, after, 4).tolist() == [0, 1, 2, 3]
    assert picture.pick(labels, labels, after, 9).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_png_of_the_command(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    from matplotlib.image import imread

    path = tmp_path / "picture.bin"  # a PNG whatever its name
    status, out, _ = run("attack", "--limit", "30", "--picture", path)
    assert status == 0 and str(path) in out and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path, format="png")
    assert pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.1


def test_flat_data_has_no_picture(run: Run, tmp_path: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "flat.npz", images=np.random.default_rng(0).random((4, 5), np.float32), labels=np.arange(4))
    model = torch.jit.trace(torch.nn.Linear(5, 4), torch.zeros(2, 5))
    torch.jit.save(model, str(tmp_path / "m.ts"))
    argv = ("attack", "--data", tmp_path / "flat.npz", "--model", tmp_path / "m.ts", "--eps", "0.1")
    status, out, err = run(*argv, "--picture", tmp_path / "a.png")
    assert status == 0 and "4 images of 5" in out and "no picture" in err and not (tmp_path / "a.png").exists()
