"""One trained digits model for all tests of the command line, in a cache of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from cli_helpers import Run
from fastrobust import models
from fastrobust.cli import main


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTROBUST_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def digits_model(cache: Path) -> nn.Sequential:
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    return models.train_digits(0)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The exit status, stdout and stderr of a command in this process."""

    def call(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def tiny() -> nn.Module:
    """An untrained model of the digits' shape with a BatchNorm, for files of models."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).eval()
