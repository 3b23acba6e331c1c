"""The normal form of graphs: the same bounds, gradients and names as the graph that a model was lowered to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds
from fastrobust.bounds import graph as G
from fastrobust.bounds.plan import as_lowered
from fastrobust.bounds.trace import trace

METHODS = ("ibp", "crown-ibp", "ibp-linear", "crown", "fast-lin")
KINDS = (
    "conv",
    "conv pad",
    "norm",
    "relu",
    "tanh",
    "leaky",
    "average",
    "average pad",
    "adaptive",
    "max",
    "cat",
    "cat norm",
    "add",
    "zero pad",
    "scale",
    "shift",
    "turned",
    "depthwise",
    "permute",
    "flip",
    "drop",
    "line",
    "tokens",
)


class Stack(nn.Module):
    """Operations of ``kinds`` on maps one after the other, then a head."""

    def __init__(self, kinds: list[str], head: str) -> None:
        super().__init__()
        self.kinds, self.head = kinds, head
        self.layers = nn.ModuleDict()
        x = torch.zeros(1, 2, 6, 5)
        for k, kind in enumerate(kinds):
            self._grow(str(k), kind, x.shape[1])
            x = self._run(str(k), kind, x)
        self.x = x.shape
        x = self._joined(x)
        self.layers["last"] = nn.Linear(x.shape[1], 7)
        self.layers["out"] = nn.Linear(7, 3)
        for m in self.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
                m.weight.data.uniform_(-1.5, 1.5), m.bias.data.normal_(0, 0.3)

    def _grow(self, k: str, kind: str, c: int) -> None:
        made: dict[str, Any] = {
            "conv": lambda: nn.Conv2d(c, 3, 2, bias=False),
            "conv pad": lambda: nn.Conv2d(c, 4, 3, 1, 1),
            "norm": lambda: nn.BatchNorm2d(c),
            "cat": lambda: nn.Conv2d(c, 2, 3, 1, 1),
            "cat norm": lambda: nn.BatchNorm2d(c),
            "add": lambda: nn.Conv2d(c, c, 1),
            "turned": lambda: nn.ConvTranspose2d(c, 3, 3, 1, 1, groups=1),
            "depthwise": lambda: nn.Conv2d(c, c, 3, 1, 1, groups=c),
            "line": lambda: nn.Conv1d(c, c, 3, 1, 1),
            "tokens": lambda: nn.Linear(c, c),
        }
        if kind in made:
            self.layers[k] = made[kind]()
        if kind == "cat norm":
            self.layers[k + " behind"] = nn.BatchNorm2d(2 * c)

    def _run(self, k: str, kind: str, x: Tensor) -> Tensor:
        layer = dict(self.layers.items()).get(k)
        h, w = x.shape[2:]
        match kind:
            case "conv" if h < 3 or w < 3:
                return x
            case "average" | "max" | "adaptive" | "average pad" if h < 4 or w < 4:
                return x
            case "relu":
                return (
                    x - 0.05
                ).relu()  # of a sum: an activation of an activation is bounded as an interval, moved or not
            case "tanh":
                return (x + 0.1).tanh()
            case "leaky":
                return F.leaky_relu(x - 0.1, 0.1)
            case "average":
                return F.avg_pool2d(x, 2)
            case "average pad":
                return F.avg_pool2d(x, 2, 2, 1, count_include_pad=bool(int(k) % 2))
            case "adaptive":
                return F.adaptive_avg_pool2d(x, (h // 2 if h % 2 == 0 else h, w // 2 if w % 2 == 0 else 1))
            case "max":
                return F.max_pool2d(x * 1.1, 2)
            case "cat":
                return torch.cat([x, layer(x).relu()], 1)
            case "cat norm":
                return self.layers[k + " behind"](torch.cat([layer(x), x], 1)).relu()
            case "add":
                return x + (x - layer(x).relu())
            case "zero pad":
                return F.pad(x, (1, 0, int(k) % 2, 1))
            case "scale":
                return x * -1.5
            case "shift":
                return 0.25 + x / 2
            case "permute":
                return x.transpose(2, 3)
            case "flip":
                return x.flip(1)
            case "drop":
                return x[:, :, : max(1, h - 1)]
            case "line":
                return layer(x.flatten(2)).relu().reshape(x.shape)
            case "tokens":
                y = x.flatten(2).transpose(1, 2)
                return (y + layer(y).relu()).transpose(1, 2).reshape(x.shape)
        return layer(x)

    def _joined(self, x: Tensor) -> Tensor:
        match self.head:
            case "global":
                return x.mean((2, 3))
            case "permute":
                return x.permute(0, 2, 3, 1).flatten(1)
            case "pooled" if x.shape[2] % 2 == 0 and x.shape[3] > 1:
                return F.avg_pool2d(x, 2).flatten(1)
            case "cat":
                return torch.cat([x.flatten(1), x.mean((2, 3))], 1)
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        for k, kind in enumerate(self.kinds):
            x = self._run(str(k), kind, x)
        return self.layers["out"](self.layers["last"](self._joined(x)).relu())


HEADS = ("flat", "global", "permute", "pooled", "cat")


def everything(net: nn.Module, x: Tensor, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Bounds, their gradients, and the bounds of the nonlinear layers' inputs."""
    found = compute_bounds(net, x, 0.05, return_intermediate=True, **options)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((found.upper.square() - found.lower).sum(), parameters, allow_unused=True)
    sized = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return [found.lower, found.upper, *sized], found.intermediate


def compared(net: nn.Module, x: Tensor, tolerance: float = 1e-9, **options: Any) -> None:
    got, own = everything(net, x, **options)
    with as_lowered():
        want, there = everything(net, x, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert list(own) == list(there)
    for name, ends in there.items():
        for a, b in zip(own[name], ends, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    st.sampled_from(HEADS),
    st.sampled_from(METHODS),
    st.integers(0, 9),
)
def test_bounds_gradients_and_names_stay_the_same(kinds: list[str], head: str, method: str, seed: int) -> None:
    torch.manual_seed(seed)
    net = Stack(kinds, head).double().eval()
    labels = torch.tensor([0, 2]) if seed % 2 else None
    compared(net, torch.rand(2, 2, 6, 5, dtype=torch.float64), method=method, labels=labels)


def maps(*layers: nn.Module, shape: tuple[int, ...] = (2, 6, 5)) -> nn.Module:
    """The layers, then a head of two dense layers, with statistics and weights of no special value."""
    body = nn.Sequential(*layers).eval()
    n = body(torch.zeros(1, *shape)).numel()
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(n, 7), nn.ReLU(), nn.Linear(7, 3))
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(-1.5, 1.5), m.bias.data.normal_(0, 0.3)
    return net.double().eval()


def kinds_of(net: nn.Module, x: Tensor) -> list[str]:
    return [type(n).__name__ for n in trace(net, x).graph.nodes[1:]]


class Of(nn.Module):
    """A function of x and a list of layers."""

    def __init__(self, f: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.f, self.layers = f, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, *self.layers)


HEAD = ["Reshape", "Dense", "Activation", "Dense"]
FORMS: dict[str, tuple[Any, list[str]]] = {
    "norm behind": (lambda: maps(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU()), ["Conv", "Activation", *HEAD]),
    "norm ahead": (
        lambda: maps(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 2, groups=2), nn.ReLU()),
        ["Conv", "Activation", *HEAD],
    ),
    "norm ahead of padding": (lambda: maps(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, 1, 1)), ["Scale", "Conv", *HEAD]),
    "norm of a turned one": (
        lambda: maps(nn.ConvTranspose2d(2, 4, 3, 2, groups=2), nn.BatchNorm2d(4), nn.ReLU()),
        ["ConvTranspose", "Activation", *HEAD],
    ),
    "turned": (
        lambda: maps(nn.ConvTranspose2d(2, 4, 3, 1, 1, groups=2, dilation=2), nn.ReLU()),
        ["Conv", "Activation", *HEAD],
    ),
    "zeros around": (
        lambda: maps(nn.ZeroPad2d((0, 1, 2, 1)), nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU()),
        ["Conv", "Activation", *HEAD],
    ),
    "same padding": (lambda: maps(nn.Conv2d(2, 3, (2, 4), padding="same"), nn.ReLU()), ["Conv", "Activation", *HEAD]),
    "average": (
        lambda: maps(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(3, 3, 2)),
        ["Conv", "Activation", "AveragePool", "Conv", *HEAD],
    ),
    "average with a divisor": (
        lambda: maps(nn.AvgPool2d(3, 2, 1, divisor_override=5), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2)),
        ["Conv", "Conv", *HEAD],
    ),
    "global average": (
        lambda: maps(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        ["Conv", "Activation", *HEAD],
    ),
    "numbers": (
        lambda: maps(nn.Conv2d(2, 3, 2), Of(lambda x: 3 - (2 * x + 1) / 4), nn.ReLU()),
        ["Conv", "Activation", *HEAD],
    ),
    "moved before a dense layer": (
        lambda: maps(nn.Conv2d(2, 3, 2), nn.ReLU(), Of(lambda x: x.permute(0, 2, 3, 1).flip(1)[:, 1:])),
        ["Conv", "Activation", *HEAD],
    ),
    "parts": (
        lambda: maps(
            Of(
                lambda x, a, b, c: c(torch.cat([a(x), b(x)], 1).relu()),
                nn.Conv2d(2, 3, 1),
                nn.Conv2d(2, 1, 1),
                nn.Conv2d(4, 2, 2),
            )
        ),
        ["Conv", "Conv", "Activation", "Activation", "Conv", "Conv", "Sum", *HEAD],
    ),
    "sums": (
        lambda: maps(Of(lambda x, a, b: a(x) - (b(x) - (x - a(x))), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, 1, 1))),
        ["Conv", "Conv", "Conv", "Sum", *HEAD],
    ),
    "reshaped between": (
        lambda: maps(nn.Conv2d(2, 3, 2), Of(lambda x: x.flatten(2).relu().reshape(x.shape)), nn.Conv2d(3, 2, 2)),
        ["Conv", "Activation", "Conv", *HEAD],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_becomes_of(name: str) -> None:
    torch.manual_seed(3)
    make, want = FORMS[name]
    net, x = make(), torch.rand(3, 2, 6, 5, dtype=torch.float64)
    found = kinds_of(net, x)
    assert sorted(found) == sorted(want)
    for method in ("ibp", "crown"):
        if name in ("average with a divisor",):  # its windows overlap, which one weight knows and two do not
            continue
        compared(net, x, method=method)


def test_windows_that_overlap_are_never_looser_in_a_weight() -> None:
    torch.manual_seed(0)
    net = maps(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(3, 1))
    x = torch.rand(4, 2, 6, 5, dtype=torch.float64)
    got = compute_bounds(net, x, 0.05, method="ibp")
    with as_lowered():
        want = compute_bounds(net, x, 0.05, method="ibp")
    assert (got.lower >= want.lower - 1e-12).all() and (got.upper <= want.upper + 1e-12).all()
    assert (got.lower > want.lower + 1e-3).any()


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("name", ["norm behind", "norm ahead", "zeros around", "parts", "numbers"])
def test_balls(name: str, norm: float, clip: Any) -> None:
    torch.manual_seed(5)
    net, x = FORMS[name][0](), torch.rand(3, 2, 6, 5, dtype=torch.float64)
    for method in ("ibp", "crown"):
        got = compute_bounds(net, x, 0.3, norm=norm, clip=clip, method=method)
        with as_lowered():
            want = compute_bounds(net, x, 0.3, norm=norm, clip=clip, method=method)
        if name == "zeros around":  # the layer reads the ball itself, which is tighter than the box around it
            assert method != "ibp" or (got.lower >= want.lower - 1e-9).all() and (got.upper <= want.upper + 1e-9).all()
            continue
        torch.testing.assert_close((got.lower, got.upper), (want.lower, want.upper), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_parameters_and_statistics_are_read_at_every_call(name: str) -> None:
    torch.manual_seed(4)
    net, x = FORMS[name][0](), torch.rand(2, 2, 6, 5, dtype=torch.float64)
    before = compute_bounds(net, x, 0.02, method="crown")
    graph = trace(net, x).graph
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            if t.is_floating_point():
                t.mul_(1.2).add_(0.01)
    found = compute_bounds(net, x, 0.02, method="crown")
    assert trace(net, x).graph is graph  # nothing was read anew
    with as_lowered():
        want = compute_bounds(net, x, 0.02, method="crown")
    assert not torch.allclose(found.lower, before.lower, atol=1e-3)
    if name != "average with a divisor":
        torch.testing.assert_close((found.lower, found.upper), (want.lower, want.upper), rtol=1e-9, atol=1e-9)
    else:
        z = net(x)
        assert (found.lower <= z).all() and (z <= found.upper).all()


ENTRIES: dict[str, tuple[Any, tuple[int, ...], list[str]]] = {
    "line": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, 2, 1),
            nn.ReLU(),
            nn.BatchNorm1d(4),
            nn.Conv1d(4, 3, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (2, 12),
        ["Conv", "Activation", "Conv", "Activation", "Reshape", "Dense"],
    ),
    "channels last": (
        lambda: nn.Sequential(
            Of(lambda x: x.permute(0, 3, 1, 2)), nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)
        ),
        (6, 5, 2),
        ["Conv", "Activation", "Reshape", "Dense"],
    ),
    "vector": (
        lambda: nn.Sequential(
            Of(lambda x: x.view(-1, 1, 5, 4)), nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        ),
        (20,),
        ["Conv", "Activation", "Reshape", "Dense"],
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)),
        (7, 3),
        ["Conv", "Activation", "Conv", "Activation", "Reshape", "Dense"],
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("each", ["number", "example", "element"])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0), "maps"])
def test_what_is_done_to_the_input_first_is_done_to_its_set(name: str, each: str, clip: Any) -> None:
    torch.manual_seed(1)
    make, shape, want = ENTRIES[name]
    net = make().double().eval()
    x, y = torch.rand(3, *shape, dtype=torch.float64) * 0.9 + 0.05, torch.tensor([0, 1, 2])
    assert [type(n).__name__ for n in trace(net, x).graph.nodes[1:]] == want
    sizes = {"number": 0.04, "example": torch.rand(3) * 0.05, "element": torch.rand(3, *shape) * 0.05}
    eps = sizes[each]
    clip = (torch.zeros(shape), torch.rand(shape) * 0.05 + 0.95) if clip == "maps" else clip
    for method, norm in (("ibp", "inf"), ("crown", "inf"), ("crown", 2)):
        options = {"norm": norm, "clip": clip, "method": method, "return_linear": method != "ibp"}
        got = compute_bounds(net, x, eps, **options)
        with as_lowered():
            there = compute_bounds(net, x, eps, **options)
        pairs = [(got.lower, there.lower), (got.upper, there.upper)]
        if got.linear is not None and norm == "inf":
            names = ("lower_A", "lower_b", "upper_A", "upper_b", "input_lower", "input_upper")
            pairs += [(getattr(got.linear, k), getattr(there.linear, k)) for k in names]
        if norm == 2 and name in ("channels last", "tokens"):  # the layer reads the ball itself, not the box around it
            assert (got.upper - got.lower).mean() <= (there.upper - there.lower).mean() + 1e-9
        else:
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        found = compute_bounds(net.float(), x.float(), eps, norm=norm, clip=clip, method=method, labels=y)
        there = compute_bounds(net.double(), x, eps, norm=norm, clip=clip, method=method, labels=y)
        torch.testing.assert_close(found.lower.double(), there.lower, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_nonlinear_layers_are_named_by_what_they_read(rounding: str) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).eval()
    found = compute_bounds(net, torch.rand(2, 1, 8, 8), 0.1, return_intermediate=True, rounding=rounding).intermediate
    assert {k: tuple(v[0].shape) for k, v in found.items()} == {"1": (2, 4, 6, 6), "3": (2, 4, 3, 3), "7": (2, 5)}


def test_values_are_computed_once_a_call_and_not_kept() -> None:
    calls = []
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 2)
    ).eval()
    x, y = torch.rand(2, 1, 6, 6), torch.tensor([0, 1])
    folded = next(n for n in trace(net, x).graph.nodes if isinstance(n, G.Conv)).get_weight
    assert isinstance(folded, G.Derived)
    compute = folded.compute
    folded.compute = lambda: calls.append(1) or compute()
    for method in METHODS:
        for grad in (False, True):
            calls.clear()
            with torch.set_grad_enabled(grad):
                compute_bounds(net, x, 0.1, method=method, labels=y)
            assert len(calls) == 1
    assert folded() is not folded()  # nothing outlives a call
    with torch.no_grad():
        first = G.values_once(lambda: (folded(), recorded(folded), folded()))()
    assert not first[0].requires_grad and first[1].requires_grad and first[2] is first[1]


def recorded(get: Any) -> Tensor:
    with torch.enable_grad():
        value: Tensor = get()
    return value


def test_threads_have_values_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    nets = [maps(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2)]
    x = torch.rand(3, 2, 6, 5, dtype=torch.float64)
    want = [compute_bounds(net, x, 0.1, method="crown").lower for net in nets]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda k: compute_bounds(nets[k % 2], x, 0.1, method="crown").lower, range(16)))
    for k, t in enumerate(got):
        assert torch.equal(t, want[k % 2])


@pytest.mark.parametrize("name", FORMS)
def test_graphs_of_inference_mode_serve_recorded_calls(name: str) -> None:
    torch.manual_seed(2)
    net, x = FORMS[name][0](), torch.rand(2, 2, 6, 5, dtype=torch.float64)
    for method in ("ibp", "crown"):
        with torch.inference_mode():
            want = compute_bounds(net, x, 0.05, method=method).lower
        got = compute_bounds(net, x, 0.05, method=method).lower
        torch.testing.assert_close(got, want.clone(), rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(got.sum(), list(net.parameters()), allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in gradients)
