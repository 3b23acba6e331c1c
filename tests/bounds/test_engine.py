"""Gradients, errors, caching, and the published tables."""

from __future__ import annotations

import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn as nn

from fastrobust.bounds import METHODS, UnsupportedLayerError, compute_bounds
from fastrobust.certify.checkpoints import load_model

from .nets import make


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("norm,clip", [(math.inf, (0.0, 1.0)), (2.0, None)])
def test_gradcheck_of_bounds_and_linear_bounds(method: str, norm: float, clip: tuple[float, float] | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()
    x = 0.2 + 0.6 * torch.rand(2, 1, 4, 4, dtype=torch.float64)
    y = torch.tensor([0, 2])
    names = [n for n, _ in net.named_parameters()]
    values = [p.detach().clone().requires_grad_(True) for p in net.parameters()]

    def f(x: torch.Tensor, eps: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for n, w in zip(names, weights, strict=False):  # the engine reads parameters from the modules
            owner, leaf = n.rsplit(".", 1)
            net.get_submodule(owner)._parameters[leaf] = w
        b = compute_bounds(net, x, eps, norm=norm, clip=clip, method=method, labels=y, return_linear=method != "ibp")
        extra = () if b.linear is None else (b.linear.lower_A, b.linear.upper_b)
        return (b.lower, b.upper, *extra)

    eps = torch.tensor([0.05, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x.requires_grad_(True), eps, *values), atol=1e-5, fast_mode=False)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_training_lowers_the_certified_loss(method: str) -> None:
    """Labels that can be learned (the brightest channel): random ones at this eps leave nothing that could be
    certified."""
    net, shape = make("cnn")
    torch.manual_seed(1)
    x = torch.rand(16, *shape)
    y = x.mean((2, 3)).argmax(1)
    opt = torch.optim.Adam(net.parameters(), 2e-2)
    losses = []
    for _ in range(16):
        low = compute_bounds(net, x, 0.02, clip=(0, 1), method=method, labels=y).lower
        loss = torch.nn.functional.softplus(-low).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_cached_graph_follows_the_model() -> None:
    net, shape = make("cnn")
    x = torch.rand(2, *shape)
    with torch.no_grad():
        before = compute_bounds(net, x, 0.01, method="ibp")
        net[0].weight.mul_(2)
        after = compute_bounds(net, x, 0.01, method="ibp")
        assert not torch.allclose(before.lower, after.lower)
        net[1] = nn.Tanh()
        z = net(x)
        third = compute_bounds(net, x, 0.0, method="crown")
        torch.testing.assert_close(third.lower, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "residual"])
@pytest.mark.parametrize("form", ["labels", "spec", "outputs"])
def test_an_empty_batch(name: str, method: str, form: str) -> None:
    net, shape = make(name)
    x = torch.rand(0, *shape)
    kwargs = {"labels": torch.zeros(0, dtype=torch.int64)} if form == "labels" else {}
    if form == "spec":
        kwargs = {"spec": torch.rand(3, 5)}
    count = {"labels": 4, "spec": 3, "outputs": 5}[form]
    found = compute_bounds(
        net, x, 0.1, method=method, return_linear=method != "ibp", return_intermediate=True, **kwargs
    )
    assert found.lower.shape == found.upper.shape == (0, count)
    if found.linear is not None:
        assert found.linear.lower_A.shape == found.linear.upper_A.shape == (0, count, *shape)
        assert found.linear.lower_b.shape == found.linear.upper_b.shape == (0, count)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


X = torch.rand(2, 3, 8, 8)


def bad(**change: object) -> object:
    net, _ = make("cnn")
    arguments = {"model": net, "x": X, "eps": 0.1, "labels": torch.tensor([0, 1]), **change}
    model, x, eps = (arguments.pop(k) for k in ("model", "x", "eps"))
    return compute_bounds(model, x, eps, **arguments)


def with_nan(where: str) -> nn.Module:
    net, _ = make("cnn")
    net.get_parameter(where).data.view(-1)[0] = math.nan
    return net


@pytest.mark.parametrize(
    "change,error,text",
    [
        ({"x": X.int()}, TypeError, "x"),
        ({"x": X * math.nan}, ValueError, "x"),
        ({"x": X.double()}, ValueError, "x"),
        ({"eps": -0.1}, ValueError, "eps"),
        ({"eps": math.inf}, ValueError, "eps"),
        ({"eps": torch.rand(3)}, ValueError, "eps"),
        ({"eps": torch.tensor([0.1, math.nan])}, ValueError, "eps"),
        ({"eps": "big"}, TypeError, "eps"),
        ({"norm": 0.5}, ValueError, "norm"),
        ({"norm": "L7"}, ValueError, "norm"),
        ({"clip": (1.0, 0.0)}, ValueError, "clip"),
        ({"clip": (0.4, 0.5)}, ValueError, "clip"),
        ({"method": "alpha"}, ValueError, "method"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"refine": "some"}, ValueError, "refine"),
        ({"refine": "some", "method": "ibp"}, ValueError, "refine"),
        ({"max_memory": 0}, ValueError, "max_memory"),
        ({"max_memory": -1, "method": "ibp"}, ValueError, "max_memory"),
        ({"max_memory": 1e9}, ValueError, "max_memory"),
        ({"sides": "left"}, ValueError, "sides"),
        ({"labels": torch.tensor([0, 5])}, ValueError, "labels"),
        ({"labels": torch.tensor([0])}, ValueError, "labels"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels"),
        ({"spec": torch.zeros(1, 5)}, ValueError, "spec"),
        ({"labels": None, "spec": torch.zeros(1, 4)}, ValueError, "spec"),
        ({"method": "ibp", "return_linear": True}, ValueError, "return_linear"),
        ({"model": with_nan("0.weight")}, ValueError, "0.weight"),
        ({"model": with_nan("7.bias"), "method": "ibp"}, ValueError, "7.bias"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4))}, ValueError, "eval"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4))}, ValueError, "eval"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmin(1), nn.LogSigmoid())},
            UnsupportedLayerError,
            "LogSigmoid at '3'",
        ),
        ({"model": Sine()}, UnsupportedLayerError, "sin at 'sin'"),
        ({"model": Branching()}, ValueError, "branches on values"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        bad(**change)


# ---- thesis tables 3.6 to 3.8: percent of the test set that is not certified ----

PUBLISHED = [  # file, activation, eps, norm, method, CRE
    ("relu_linf/mnist_fc1_l1_kw.ckpt", "relu", 0.1, math.inf, "fast-lin", 12.91),
    ("relu_linf/mnist_fc1_l1_kw.ckpt", "relu", 0.1, math.inf, "ibp", 69.20),
    ("relu_linf/mnist_fc1_l1_ibp.ckpt", "relu", 0.1, math.inf, "fast-lin", 87.27),
    ("relu_linf/mnist_fc1_l1_ibp.ckpt", "relu", 0.1, math.inf, "ibp", 15.20),
    ("relu_linf/mnist_fc1_l1_c-perat.ckpt", "relu", 0.1, math.inf, "fast-lin", 12.90),
    ("relu_linf/mnist_fc1_l1_c-perat.ckpt", "relu", 0.1, math.inf, "ibp", 99.90),
    ("relu_l2/mnist_fc1_l2_i-per.ckpt", "relu", 0.3, 2, "fast-lin", 5.34),
    ("relu_l2/mnist_fc1_l2_i-per.ckpt", "relu", 0.3, 2, "ibp", 54.13),
    ("sigmoid_linf/sigd_c-per.ckpt", "sigmoid", 0.1, math.inf, "fast-lin", 12.15),
    ("sigmoid_linf/sigd_c-per.ckpt", "sigmoid", 0.1, math.inf, "ibp", 84.76),
    ("tanh_l2/tanh_i-per+at.ckpt", "tanh", 0.3, 2, "ibp", 53.73),
    ("relu_linf/mnist_cnn_l1_ibp.ckpt", "relu", 0.1, math.inf, "fast-lin", 23.89),
    ("relu_linf/mnist_cnn_l1_ibp.ckpt", "relu", 0.1, math.inf, "ibp", 8.13),
    ("relu_linf/mnist_cnn_l1_c-perat.ckpt", "relu", 0.1, math.inf, "fast-lin", 4.85),
]


@pytest.mark.data
@pytest.mark.parametrize("path,act,eps,norm,method,percent", PUBLISHED)
def test_published_certified_errors(
    data_dir: pathlib.Path, path: str, act: str, eps: float, norm: float, method: str, percent: float
) -> None:
    file = data_dir / "polyenvelope" / path
    if not file.exists():
        pytest.skip(f"needs {path} in FASTROBUST_DATA/polyenvelope")
    net = load_model(file, layout="cnn" if "_cnn_" in path else "fc1", activation=act)
    d = np.load(data_dir / "mnist.npz")
    x = torch.tensor(d["test_images"]).float().view(-1, 1, 28, 28) / 255
    y = torch.tensor(d["test_labels"]).long()
    bad = 0
    with torch.no_grad():
        for part, labels in zip(x.split(500), y.split(500), strict=True):
            found = compute_bounds(
                net, part, eps, norm=norm, clip=(0, 1), method=method, labels=labels, sides="lower", refine="all"
            )
            bad += int((~(found.lower.amin(1) > 0)).sum())
    assert abs(bad / 100 - percent) <= 0.011
