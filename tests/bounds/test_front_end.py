"""What is bounded is what the model computes, whatever ordinary PyTorch it is written in; or it is refused with its
line named."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.bounds import ModelMismatchError, UnreadableModelError, UnsupportedLayerError, api, compute_bounds

from .nets import ONE_PASS


class Net(nn.Module):
    """Parts and a function of them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 4), nn.ReLU(inplace=True)
        self.rnn, self.run = nn.RNN(2, 4, batch_first=True), run
        self.rectified = nn.RNN(2, 4, nonlinearity="relu", batch_first=True)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, mask: Tensor | None = None, features: bool = False, *, depth: int = 1) -> Any:
        h = self.run(self, x)
        if mask is not None:
            h = h * mask
        if features:
            return h
        for _ in range(depth):
            h = h + 1
        return h


def centre(model: nn.Module, x: Tensor, method: str = "crown-ibp") -> None:
    """Bounds of a point are the model's output, bounds of a ball hold its outputs."""
    with torch.no_grad():
        want = model(x.clone())
        found = compute_bounds(model, x, 0.0, method=method)
        torch.testing.assert_close(found.lower, want, rtol=1e-4, atol=1e-5)
        ball = compute_bounds(model, x, 0.1, method=method)
        for _ in range(20):
            z = model(x + 0.1 * (2 * torch.rand_like(x) - 1))
            assert (z >= ball.lower - 1e-5).all() and (z <= ball.upper + 1e-5).all()


def unpacked(m: Any, x: Tensor) -> Tensor:
    b, c, w = (x if x.dim() == 3 else x.unsqueeze(1)).shape
    assert x.shape[-1] == 6 and isinstance(x, Tensor)
    return m.b(x.reshape(b, c * w))


def rows(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.b(F.relu(m.a(x[i]))) for i in range(len(x))])


def written(m: Any, x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 4)
    out[:, :2] = m.b(x)[:, 1:3]
    out[:, 3] += x[:, 0]
    return out


MODELS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "aliased residual": lambda m, x: (lambda h: h + m.a(m.act(h)))(m.a(x)),
    "shapes": unpacked,
    "examples in a loop": rows,
    "written in parts": written,
    "first and last": lambda m, x: m.b(x) if x.ndim == 2 else x,
    "keyword arguments": lambda m, x: torch.clamp(
        F.linear(input=x, weight=m.b.weight, bias=m.b.bias), min=-0.1, max=0.3
    ),
    "matrix in front": lambda m, x: (m.b.weight @ x.unsqueeze(-1)).squeeze(-1),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.b.weight),
    "extremes over parts": lambda m, x: torch.cat(
        [x.view(-1, 2, 3).max(2).values, x.view(-1, 2, 3).amin(1), x.abs()], dim=1
    ),
    "padded with constants": lambda m, x: torch.cat([x, torch.zeros(len(x), 2), m.b.bias.expand(len(x), -1)], 1),
    "weight of a call": lambda m, x: F.linear(x, m.b.weight.tanh() * 2),
    "slope a parameter": lambda m, x: F.prelu(x, m.b.bias[:1]),
    "dropout that asks": lambda m, x: m.b(F.dropout(x, 0.5, training=m.training)),
    "interpolated": lambda m, x: F.interpolate(x.view(-1, 1, 2, 3), scale_factor=2).flatten(1),
    "no gradient inside": lambda m, x: m.b(x.detach().mul_(2.0)),
    "single numbers": lambda m, x: F.relu(x).sum(1),
    "frames as examples": lambda m, x: F.conv1d(x.reshape(-1, 1, 3), m.b.weight[:2, None, :2]).reshape(len(x), -1),
    "recurrent": lambda m, x: m.rnn(x.view(-1, 3, 2))[0][:, -1],
    "turned in place": lambda m, x: m.b(
        x.view(-1, 2, 3).clone().transpose_(1, 2).reshape(-1, 6).unsqueeze_(1).squeeze_(1)
    ),
    "scaled exponentials": lambda m, x: m.b(F.selu(x)) + F.celu(x, 0.5)[:, :4] + F.hardsigmoid(x)[:, 2:],
    "randomised slope": lambda m, x: F.rrelu(x, training=False),
    "recurrent, rectified": lambda m, x: m.rectified(x.view(-1, 3, 2))[0][:, -1],
    "tokens": lambda m, x: F.linear(x.view(-1, 3, 2), m.b.weight[:2, :2], m.b.bias[:2]).transpose(0, 1).transpose(0, 1),
    "different matrices": lambda m, x: torch.baddbmm(
        x.view(-1, 3, 2), x.view(-1, 3, 2), m.b.weight[:2, :2].expand(len(x), 2, 2)
    ),
    "heads": lambda m, x: (x.view(-1, 3, 1, 2) @ m.b.weight.view(-1, 2, 2)[:3]).flatten(1),
    "volumes": lambda m, x: F.conv3d(x.view(-1, 1, 1, 2, 3), m.b.weight.view(-1, 1, 1, 2, 3)).flatten(1),
    "folded": lambda m, x: F.fold(F.unfold(x.view(-1, 1, 2, 3), 2), (2, 3), 2).flatten(1),
    "running sums": lambda m, x: x.cumsum(1),
    "gathered": lambda m, x: torch.cat([x[:, [5, 0, 0]], x.gather(1, torch.tensor([[1, 3]]).expand(len(x), 2))], 1),
    "chosen by constants": lambda m, x: torch.where(m.b.bias.repeat(2)[:6] > 0, x, -x).masked_fill(
        m.b.bias.repeat(2)[:6] < -0.2, 1.5
    ),
    "smooth interpolation": lambda m, x: F.interpolate(x.view(-1, 1, 2, 3), size=(3, 4), mode="bicubic").flatten(1),
    "shuffled": lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x.view(-1, 6, 1, 1).repeat(1, 2, 1, 1), 2), 2).flatten(
        1
    ),
    "by hand": lambda m, x: (x - x.new_tensor(0.3)) / torch.tensor([0.2] * 6) - 2 * x.flip(1).roll(1, 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models(name: str) -> None:
    torch.manual_seed(1)
    net, x = Net(MODELS[name]).eval(), torch.randn(3, 6)
    for method in ONE_PASS:
        centre(net, x, method)


@pytest.mark.parametrize(
    "kind", ["list", "dict", "object", "global", "closure", "forward", "hook", "submodule", "flag"]
)
def test_what_changes_after_the_first_call_is_seen(kind: str) -> None:
    torch.manual_seed(2)
    held = [1.0]
    net = Net(
        lambda m, x: (
            m.b(m.a(x)) * m.gains[0] * m.table["gain"] * m.config.gain * held[0] * SCALE[0] * (1 if m.flag else -1)
        ),
        gains=[1.0],
        table={"gain": 1.0},
        config=types.SimpleNamespace(gain=1.0),
        flag=True,
    ).eval()
    x = torch.randn(3, 6)
    centre(net, x)
    if kind == "list":
        net.gains[0] = -2.0
    elif kind == "dict":
        net.table["gain"] = 0.5
    elif kind == "object":
        net.config.gain = -0.1
    elif kind == "global":
        SCALE[0] = 3.0
    elif kind == "closure":
        held[0] = -1.0
    elif kind == "forward":
        net.forward = lambda x: -net.run(net, x)  # type: ignore[method-assign]
    elif kind == "hook":
        net.a.register_forward_hook(lambda m, i, o: o * 2)
    elif kind == "submodule":
        net.b = nn.Linear(6, 4)
    else:
        net.flag = False
    centre(net, x)
    SCALE[0] = 1.0


SCALE = [1.0]


@pytest.mark.parametrize("kind", ["instance", "hook", "pre-hook", "global hook", "attribute"])
def test_layers_of_torch_that_were_changed(kind: str) -> None:
    """Models of torch's layers alone are not recorded at every call: what can change them all the same."""
    net = nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU(0.1), nn.Linear(6, 4)).eval()
    x = torch.randn(3, 6)
    centre(net, x)
    handle = None
    if kind == "instance":
        net[1].forward = lambda t: -t  # type: ignore[method-assign]
    elif kind == "hook":
        net[0].register_forward_hook(lambda m, i, o: o + 1)
    elif kind == "pre-hook":
        net.register_forward_pre_hook(lambda m, i: (2 * i[0],))
    elif kind == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o: o * 1.5 if isinstance(m, nn.Linear) else None
        )
    else:
        net[1].negative_slope = 0.7
    try:
        centre(net, x)
    finally:
        if handle is not None:
            handle.remove()


def test_wrappers_compute_what_they_wrap() -> None:
    torch.manual_seed(0)
    net, x = Net(MODELS["aliased residual"]).eval(), torch.randn(3, 6)
    want = compute_bounds(net, x, 0.1).lower
    for wrapped in (nn.DataParallel(net), torch.compile(net), nn.Sequential(torch.compile(net))):
        assert torch.equal(compute_bounds(wrapped, x, 0.1).lower, want)


class Exported(nn.Module):
    """As converters write it: the batch of the export in its reshapes."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.w = nn.Conv2d(1, 2, 2), nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.c(torch.reshape(x, (1, 1, 3, 3))))
        return torch.reshape(h, (1, 8)) @ self.w


@pytest.mark.parametrize("method", ONE_PASS)
def test_batch_of_one_written_out(method: str) -> None:
    net, x = Exported().eval(), torch.rand(4, 1, 3, 3)
    with torch.no_grad():
        want = torch.cat([net(v) for v in x.split(1)])
        torch.testing.assert_close(compute_bounds(net, x, 0.0, method=method).lower, want)


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def counted(m: Any, x: Tensor) -> Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return x * m.calls


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "branch on a value": (
        lambda m, x: x if x.sum() > 0 else -x,
        UnreadableModelError,
        r"branches on values.*test_front_end.py",
    ),
    "number of a value": (
        lambda m, x: x * x.max().item(),
        UnreadableModelError,
        r"branches on values.*test_front_end.py",
    ),
    "mask of values": (lambda m, x: x[x > 0].view(1, -1), UnreadableModelError, "branches on values"),
    "random numbers": (lambda m, x: x + torch.randn_like(x), UnreadableModelError, "random numbers.*test_front_end.py"),
    "training": (lambda m, x: F.dropout(x, 0.5), UnreadableModelError, r"call model.eval\(\)"),
    "mean of the batch": (lambda m, x: x - x.mean(0), ModelMismatchError, "mix(es)? the examples"),
    "its neighbour": (lambda m, x: x + 0.5 * x.roll(1, 0), ModelMismatchError, "mix(es)? the examples"),
    "sum of the batch": (lambda m, x: x.sum(), ModelMismatchError, "mixes the examples"),
    "outside torch": (lambda m, x: x + torch.from_numpy(np.tanh(x.detach().numpy())), ModelMismatchError, "numpy"),
    "counts its calls": (counted, ModelMismatchError, "change between calls"),
    "one size alone": (lambda m, x: x if len(x) == 1 else 2 * x, ModelMismatchError, "differ"),
    "two outputs": (lambda m, x: (x, x), ValueError, "tuple"),
    "constant": (lambda m, x: m.b.weight, ValueError, "does not depend on the input"),
    "unknown operation": (
        lambda m, x: torch.sin(x),
        ValueError,
        r"operation sin at 'sin' is not supported \(.*test_front_end.py",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    run, error, text = REFUSED[name]

    class Refused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Any:
            return run(self, x)

    with pytest.raises(error, match=text):
        compute_bounds(Refused().eval(), torch.rand(3, 6), 0.1, method="crown")


def test_reading_a_model_moves_nothing() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)).train(), torch.rand(5, 6)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="eval"):
        compute_bounds(net, x, 0.1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training
    counts = Stateful()
    with pytest.raises(UnreadableModelError, match="writes into a tensor that it keeps"):
        compute_bounds(counts, x, 0.1)
    assert counts.count == 0
    compute_bounds(net.eval(), x, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    kept = x.clone()
    compute_bounds(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2)), x - 0.5, 0.1)
    compute_bounds(Net(lambda m, x: m.b(x.sub_(0.5))).eval(), x, 0.1)
    assert torch.equal(x, kept)


def test_other_modes_of_torch() -> None:
    torch.manual_seed(0)
    net, x = Net(MODELS["matrix in front"]).eval(), torch.rand(3, 6)
    want = compute_bounds(net, x, 0.1, method="crown").lower
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compute_bounds(net, x, 0.1, method="crown").lower
    assert got.dtype == torch.float32 and torch.equal(got, want)
    with torch.inference_mode():
        assert torch.equal(compute_bounds(net, x, 0.1, method="crown").lower, want)


def test_gradients_reach_what_weights_are_computed_from() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    net, x = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)).double().eval(), torch.rand(3, 6, dtype=torch.float64)
    size = layer.parametrizations.weight.original0
    for method in ("ibp", "crown-ibp", "crown"):

        def value(method: str = method) -> Tensor:
            return compute_bounds(net, x, 0.1, method=method).lower.sum()

        (grad,) = torch.autograd.grad(value(), size)
        with torch.no_grad():
            step = torch.zeros_like(size)
            step[1] = 1e-6
            size += step
            above = value()
            size -= 2 * step
            below = value()
            size += step
        torch.testing.assert_close(grad[1, 0], (above - below) / 2e-6, rtol=1e-4, atol=1e-6)


def test_what_large_batches_do_is_seen() -> None:
    net = Net(lambda m, x: m.b(x) if len(x) < 40 else -m.b(x)).eval()
    compute_bounds(net, torch.rand(3, 6), 0.1)
    for _ in range(2):
        with pytest.raises(ModelMismatchError):
            compute_bounds(net, torch.rand(40, 6), 0.1)
    tied = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval()
    x = torch.rand(3, 6)
    del tied[0].weight
    for _ in range(2):
        tied[0].weight = torch.randn(4, 6)
        centre(tied, x)


@pytest.mark.parametrize("wrong", [0.5, -0.5])
def test_bounds_that_do_not_hold_are_not_returned(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kernel they come from."""
    net, x, y = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.rand(3, 6), torch.arange(3)
    right = compute_bounds(net, x, 0.0, method="ibp", labels=y)
    ends = torch.stack([right.lower, right.upper]) + wrong
    monkeypatch.setattr(api, "small_margins", lambda *a: ends)
    with pytest.raises(ModelMismatchError, match="outside the bounds"):
        compute_bounds(net, x, 0.0, method="ibp", labels=y)
    assert torch.equal(compute_bounds(net, x, 0.0, method="ibp", labels=y, check="none").lower, ends[0])


def test_check_on_request() -> None:
    class Late(nn.Module):
        """Differs from what a record of its first example says, on the third example alone."""

        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            bump = (x.detach().numpy()[:, 0] > 100).astype(np.float32)
            return self.b(x) + torch.from_numpy(bump)[:, None]

    net, x = Late().eval(), torch.rand(3, 6)
    x[2, 0] = 101
    compute_bounds(net, x[:2], 0.1)
    with pytest.raises(ModelMismatchError):
        compute_bounds(net, x, 0.1, check="all")
    with pytest.raises(ValueError, match="check: got 'some'"):
        compute_bounds(net, x, 0.1, check="some")
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    for method in ONE_PASS:
        want = compute_bounds(plain, x, 0.1, method=method, check="none").lower
        assert torch.equal(compute_bounds(plain, x, 0.1, method=method, check="all").lower, want)


class Plain(Net):
    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return self.run(self, x)


@pytest.mark.parametrize("written", ["module", "function", "method"])
def test_margins_of_a_model_that_ends_in_log_softmax(written: str) -> None:
    """They are those of the logits; nothing else of it is bounded."""
    torch.manual_seed(0)
    end: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "module": lambda m, x: nn.LogSoftmax(dim=1)(m.b(F.relu(m.a(x)))),
        "function": lambda m, x: F.log_softmax(m.b(F.relu(m.a(x))), dim=-1),
        "method": lambda m, x: m.b(F.relu(m.a(x))).log_softmax(1),
    }
    net, x, y = Plain(end[written]).eval(), torch.rand(3, 6), torch.tensor([0, 3, 1])
    logits = nn.Sequential(net.a, nn.ReLU(), net.b)
    spec = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.5, 0.5, 0.0, -1.0]])
    for method in ONE_PASS:
        for rows in ({"labels": y}, {"spec": spec}):
            got, want = (compute_bounds(m, x, 0.1, method=method, **rows) for m in (net, logits))
            assert torch.equal(got.lower, want.lower) and torch.equal(got.upper, want.upper)
    plain = nn.Sequential(*logits, nn.LogSoftmax(dim=1)).eval()
    got, want = (compute_bounds(m, x, 0.1, method="ibp", labels=y) for m in (plain, logits))
    assert torch.equal(got.lower, want.lower)
    for refused in ({}, {"spec": spec.abs()}, {"rounding": "outward"}):
        with pytest.raises(UnsupportedLayerError, match="log_softmax"):
            compute_bounds(net, x, 0.1, **refused)
    over_places = Plain(lambda m, x: m.b(F.relu(m.a(x))).view(-1, 2, 2).log_softmax(1).flatten(1)).eval()
    with pytest.raises(UnsupportedLayerError):
        compute_bounds(over_places, x, 0.1, labels=y)
