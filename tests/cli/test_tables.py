"""Tables of the thesis' chapter 3: what is printed, which networks are found, and ours beside it on a few images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cli_helpers import Run
from fastrobust.benchmarks import thesis_tables as thesis
from fastrobust.certify import polyhedral_envelope


def row(table: str, name: str) -> thesis.Printed:
    (found,) = [r for r in thesis.PRINTED if r.table == table and r.name == name]
    return found


def test_printed_figures() -> None:
    assert [sum(r.table == t for r in thesis.PRINTED) for t in ("3.6", "3.7", "3.8")] == [33, 33, 32]
    best = row("3.6", "cifar10 cnn relu Linf i-per+at")
    assert best.figures == (26.66, 43.35, 57.72, 100, 47.87, 0.0033, 0, 0.0040) and best.eps == 2 / 255
    two = row("3.7", "mnist fc1 relu L2 l-per+at").figures
    assert two[:4] == (0.67, 1.40, 4.84, 64.79) and math.isnan(two[4]) and two[5:] == (0.2855, 0.1056, 0.2910)
    assert row("3.8", "mnist fc1 tanh L2 i-per+at").figures[2] == 5.57
    assert thesis.SEARCHES["mnist", "fc1", "Linf", "kw"] == (12, 8.48) and len(thesis.SEARCHES) == 42
    for r in thesis.PRINTED:
        clean, pgd, linear, ibp, mip, *bounds = r.figures
        assert clean <= pgd <= linear + 1 and bounds[0] <= bounds[2] <= r.eps
        assert math.isnan(mip) or mip <= min(linear, ibp) or r.method == "at"  # where MIPVerify ran out of time
        assert bounds[0] == pytest.approx(r.eps * (1 - linear / 100), abs=0.011)


@pytest.mark.parametrize(
    ("table", "name", "file"),
    [
        ("3.6", "mnist fc1 relu Linf l-per", "relu_linf/mnist_fc1/mnist_fc1_l1_c-per.ckpt"),
        ("3.6", "cifar10 cnn relu Linf l-per+at", "relu_linf/cifar_cnn_l1_c-perat.ckpt"),
        ("3.7", "mnist cnn relu L2 mmr+at", "relu_l2/mnist_cnn/mnist_cnn_l2_mmr+at.ckpt"),
        ("3.8", "mnist fc1 sigmoid L2 l-per+at", "sigd_l2/mnist_fc1/sigd_c-per+at.ckpt"),
        ("3.8", "mnist fc1 sigmoid Linf l-per", "sigmoid_linf/sigd_c-per.ckpt"),
    ],
)
def test_published_files(tmp_path: Path, table: str, name: str, file: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert [r.name for r in thesis.PRINTED if r.published(tmp_path)] == [name]
    assert row(table, name).published(tmp_path) == tmp_path / file


def test_rows_of_a_few_images(run: Run, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", test_images=images, test_labels=labels)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10)
    )
    x = torch.tensor(images).view(-1, 1, 28, 28) / 255
    with torch.no_grad():
        model[3].weight *= 0.01  # the last bias decides, so that some images are certified
        model[3].bias[:] = torch.tensor([0.1, 0.0, 0, 0, 0, 0, 0, 0, 0, 0])
        right = model(x).argmax(1) == torch.tensor(labels)
        radius = polyhedral_envelope(model, x, torch.tensor(labels).long(), 0.1, clip=(0, 1), refine="all").radius
    trained = tmp_path / "nets"
    trained.mkdir()
    torch.save(model.state_dict(), trained / "kw.pt")
    out = tmp_path / "t.json"
    options = ("--data", str(tmp_path), "--trained", str(trained), "--exact", "--timeout", "2", "--out", str(out))
    status, text, err = run("tables", "--rows", "fc1 relu Linf", *options)
    assert status == 0 and err == ""
    assert "3.6 mnist fc1 relu Linf: no checkpoint of plain, at, kw" in text and thesis.SOURCE in text
    shot, search = json.loads(out.read_text())["rows"]
    assert shot["key"] == "3.6 mnist fc1 relu Linf kw, trained here" and shot["images"] == 6
    ours = shot["ours"]
    assert ours["CTE"] == pytest.approx(100 - 100 * right.double().mean().item())
    assert ours["ACB PEC"] == pytest.approx(radius.double().mean().item(), abs=1e-7) and ours["ACB PEC"] > 0
    assert ours["CTE"] <= ours["PGD"] <= ours["CRE MIP"] <= ours["CRE Lin"] + 1e-9 and shot["undecided"] == 0
    assert shot["printed"]["CRE MIP"] == 10.90 and search["printed"] == 8.48 and search["T_Lin"] == 12
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("3.6 mnist fc1 relu Linf kw, trained here"))
    assert lines[at + 1].split()[1:] == ["2.26", "8.59", "12.91", "69.20", "10.90", "0.0871", "0.0308", "0.0928"]
    assert float(lines[at + 2].split()[1]) == pytest.approx(ours["CTE"] - 2.26, abs=0.006)


def test_what_is_missing_or_wrong(run: Run, tmp_path: Path) -> None:
    for words, text in (
        (("--rows", "nosuch"), "rows: got ['nosuch'], expected words of rows"), (("--images", "0"), "images: got 0"),
        (("--timeout", "0"), "timeout: got 0"), (("--trained", "nosuch"), "trained: got nosuch, expected a folder"),
    ):  # fmt: skip
        status, _, err = run("tables", "--data", str(tmp_path), *words)
        assert status == 2 and text in err
    status, out, err = run("tables", "--data", str(tmp_path), "--table", "3.2", "3.3")
    assert status == 0 and out.count("skipped: data: there is no") == 10 and "fashion_mnist.npz" in out
    (tmp_path / "mnist_fc1_l1_kw.ckpt").touch()
    folder = tmp_path / "relu_linf"
    folder.mkdir()
    torch.save({}, folder / "mnist_fc1_l1_kw.ckpt")
    status, _, err = run("tables", "--data", str(tmp_path), "--published", str(tmp_path), "--rows", "fc1_l1_kw")
    assert status == 2 and "there is no mnist.npz" in err and "yann.lecun.com" in err
