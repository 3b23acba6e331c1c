"""fastrobust certify: files, summary, errors, and the same file from one worker and from two."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.cli import main


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    x = torch.randint(0, 256, (23, 6, 6), dtype=torch.uint8)
    y = model(x[:, None].float() / 255).argmax(1)
    y[3] = (y[3] + 1) % 5
    np.savez(tmp_path / "data.npz", test_images=x.numpy(), test_labels=y.numpy())
    torch.save(
        {"a.weight": model[1].weight, "a.bias": model[1].bias, "b.weight": model[3].weight, "b.bias": model[3].bias},
        tmp_path / "state.pt",
    )
    torch.save(model, tmp_path / "whole.pt")
    return tmp_path, model, x[:, None].float() / 255, y


def arguments(folder, *more):
    model = ["--model", str(folder / "state.pt"), "--layout", "dense"]
    return ["certify", *model, "--activation", "relu", "--data", str(folder / "data.npz"), "--no-progress", *more]


def test_one_shot_file_and_summary(files, capsys):
    folder, model, x, y = files
    assert main(arguments(folder, "--eps", "0.02", "--out", str(folder / "r.csv"), "--batch-size", "7")) == 0
    text = capsys.readouterr().out
    for name in (
        "clean test error (CTE)",
        "certified robust error, linear bounds (CRE Lin)",
        "certified robust error, interval bounds (CRE IBP)",
        "average certified bound, linear bounds (ACB Lin)",
        "average certified bound, interval bounds (ACB IBP)",
        "average certified bound, polyhedral envelope certification (ACB PEC)",
    ):
        assert name in text
    assert "Flatten - Linear(36, 20) - ReLU - Linear(20, 5)" in text and "box [0, 1]" in text
    with open(folder / "r.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    want = fr.certify.polyhedral_envelope(model, x, y, 0.02, clip=(0, 1))
    assert [int(r["index"]) for r in rows] == list(range(23))
    np.testing.assert_allclose([float(r["radius"]) for r in rows], want.radius.detach(), rtol=1e-4, atol=1e-7)
    assert [bool(int(r["certified"])) for r in rows] == want.certified.tolist()
    assert rows[3]["radius"] == "0.0"
    (line,) = [line for line in text.splitlines() if "(CTE)" in line]
    assert line.split() == ["clean", "test", "error", "(CTE)", f"{100 / 23:.2f}", "%"]


def test_search_to_npz(files):
    folder, model, x, y = files
    out = folder / "r.npz"
    assert (
        main(
            arguments(
                folder,
                "--high",
                "0.4",
                "--tol",
                "1e-3",
                "--norm",
                "2",
                "--limit",
                "9",
                "--first",
                "2",
                "--out",
                str(out),
            )
        )
        == 0
    )
    found = np.load(out)
    assert found["index"].tolist() == list(range(2, 11))
    want = fr.certify.search_radius(model, x[2:11], y[2:11], high=0.4, tol=1e-3, norm=2, clip=(0, 1))
    np.testing.assert_allclose(found["radius"], want.radius, rtol=1e-4, atol=1e-6)
    assert found["evaluations"].max() <= 9


def test_two_workers_write_the_same_file(files):
    folder, *_ = files
    one, two = (
        arguments(folder, "--eps", "0.02", "--batch-size", "4", "--out", str(folder / f"w{n}.csv")) for n in (1, 2)
    )
    assert main(one) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "fastrobust.cli.certify", *two[1:]]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ACB PEC") == 1
    outs = [(folder / f"w{n}.csv").read_bytes() for n in (1, 2)]
    assert outs[0] == outs[1]
    assert outs[0].count(b"\n") == 24


def test_bad_input_is_one_line(files, capsys):
    folder, *_ = files
    cases = [
        (arguments(folder), "eps, high"),
        (arguments(folder, "--eps", "0.1", "--high", "0.4"), "eps, high"),
        (arguments(folder, "--eps", "0.1", "--out", str(folder / "r.txt")), "out"),
        (arguments(folder, "--eps", "0.1", "--first", "99"), "first"),
        (["certify", "--model", "/nowhere", "--eps", "0.1", "--data", str(folder / "data.npz")], "there is no file"),
        (
            ["certify", "--model", str(folder / "whole.pt"), "--eps", "0.1", "--data", str(folder / "data.npz")],
            "--trust",
        ),
        (
            ["certify", "--model", str(folder / "state.pt"), "--eps", "0.1", "--data", "/nowhere.npz"],
            "there is no file",
        ),
        (arguments(folder, "--eps", "0.1", "--split", "train", "--no-clip"), "no images"),
        (arguments(folder, "--eps", "0.1", "--norm", "0.5"), "--norm"),
        (arguments(folder, "--high", "0.1", "--tol", "0"), "--tol"),
    ]
    for command, words in cases:
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
