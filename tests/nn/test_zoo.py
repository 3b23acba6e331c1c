"""The networks of the papers: shapes at any width, parameter counts against printed or computed figures, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrobust.nn import zoo


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(make: Any, *args: Any, **options: Any) -> int:
    """Parameters, without their memory."""
    with torch.device("meta"):
        return count(make(*args, **options))


def test_published_counts() -> None:
    assert on_meta(zoo.preact_resnet18) == 11_172_170  # 11.17 M
    assert on_meta(zoo.wrn, 34, 10) == 46_160_474  # 46.16 M
    assert round(on_meta(zoo.wrn, 28, 10) / 1e6, 1) == 36.5  # Zagoruyko & Komodakis 2016, table 4
    assert round(on_meta(zoo.wrn, 16, 8) / 1e6, 1) == 11.0
    assert round(on_meta(zoo.wrn, 40, 4) / 1e6, 1) == 8.9
    assert on_meta(zoo.fc1) == 784 * 1024 + 1024 + 1024 * 10 + 10
    # thesis chapter 3: conv(16,4,2,1), conv(32,4,2,1), 1568-100-10
    assert on_meta(zoo.thesis_cnn) == 16 * 17 + 32 * (16 * 16 + 1) + 1568 * 100 + 100 + 1010


@pytest.mark.parametrize("width", [2, 16])
def test_counts_of_table_4_1(width: int) -> None:
    w = width
    lenet = 2 * w * 26 + 4 * w * (2 * w * 25 + 1) + (196 * w + 1) * 64 * w + (64 * w + 1) * 10
    assert on_meta(zoo.lenet, width=w) == lenet
    channels = [3, *(f * w for f in (4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32))]
    vgg = sum(9 * a * b + 2 * b for a, b in zip(channels, channels[1:], strict=False)) + (32 * w + 1) * 10
    assert on_meta(zoo.vgg, width=w) == vgg


NAMES = {
    "digits-cnn": (1, 8, 8),
    "mnist-cnn": (1, 28, 28),
    "fc1": (1, 28, 28),
    "cnn": (3, 32, 32),
    "cnn-4": (1, 28, 28),
    "cnn-8": (3, 32, 32),
    "lenet": (1, 28, 28),
    "vgg": (3, 32, 32),
    "preact-resnet-18": (3, 32, 32),
    "wrn-10-1": (3, 32, 32),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains(name: str) -> None:
    fixed = name in ("digits-cnn", "mnist-cnn")
    torch.manual_seed(0)
    model = zoo.build(name, 10, NAMES[name], width=None if fixed else 2)
    x, y = torch.rand(6, *NAMES[name]), torch.arange(6)
    x.requires_grad_()
    logits = model(x)
    assert logits.shape == (6, 10)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert sum(bool((p.grad != 0).any()) for p in model.parameters()) >= 0.8 * len(list(model.parameters()))  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for _ in range(8):
        optimizer.zero_grad()
        now = F.cross_entropy(model(x.detach()), y)
        now.backward()
        optimizer.step()
    assert now.item() < loss.item()


def test_other_shapes_and_classes() -> None:
    assert zoo.build("preact-resnet-18", 7, (1, 28, 28), width=4)(torch.rand(2, 1, 28, 28)).shape == (2, 7)
    assert zoo.build("cnn-4", 3, (3, 32, 32), width=1)(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    assert zoo.build("fc1", 3, (20,), width=5)(torch.rand(2, 20)).shape == (2, 3)
    assert zoo.wrn(10, 1, dropout=0.3)(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_preact_block_by_its_definition() -> None:
    torch.manual_seed(0)
    for stride, out in ((1, 4), (2, 6)):
        block = zoo.PreActBlock(4, out, stride).eval()
        x = torch.randn(2, 4, 8, 8)
        o = F.relu(block.bn1(x))
        inner = F.conv2d(
            F.relu(block.bn2(F.conv2d(o, block.conv1.weight, None, stride, 1))), block.conv2.weight, None, 1, 1
        )
        kept = x if block.shortcut is None else F.conv2d(o, block.shortcut.weight, None, stride)
        torch.testing.assert_close(block(x), inner + kept)


@pytest.mark.parametrize(
    ("name", "shape", "width", "text"),
    [
        ("resnet", (3, 32, 32), None, "model: got 'resnet', expected one of"),
        ("wrn-11-2", (3, 32, 32), None, "depth: got 11"),
        ("cnn-8", (3, 4, 4), None, "at least 8x8"),
        ("lenet", (784,), None, "shape: got images"),
        ("digits-cnn", (1, 28, 28), None, "digits_cnn takes images"),
        ("digits-cnn", (1, 8, 8), 3, "has one width only"),
        ("vgg", (3, 32, 32), 0, "width: got 0"),
    ],
)
def test_refused(name: str, shape: tuple[int, ...], width: int | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        zoo.build(name, 10, shape, width=width)
