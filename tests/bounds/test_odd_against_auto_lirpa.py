"""The networks of ``test_odd_networks`` and smooth ones against auto_LiRPA, wherever it takes them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds

from .nets import make, points_of_set, random_statistics
from .recorded import auto_lirpa_bounds
from .test_odd_networks import NETS

# What auto_LiRPA 0.7.1 does not take, and what it says.
NO_MODULE = {
    "transposed": "no output padding, no groups",
    "transposed, dilated": "no dilation",
    "circular": "no padding mode",
    "same, even kernel": "no unequal padding",
    "one dimension": "no transposed convolution of one dimension",
    "max pooling, dilated": "no dilation",
    "separable": "no adaptive average pooling",
    "up and across": "no Upsample",
    "smooth, two branches": "no GELU",
    "permuted and cut": "no such slice",
}
NO_CROWN = {"max pooling"}  # a stride that is not the kernel's size, for linear bounds
NO_CROWN_PASS = {"normalised input", "negated"}  # an assertion of its own, for CROWN alone
# In l2 it forgets the radius where something other than a convolution or a linear layer reads the input (its interval
# of -x around x is the point -x), or refuses: concatenation, one-dimensional convolutions.
NO_L2 = {
    "one dimension, residual",
    "concatenated",
    "normalised first",
    "normalised input",
    "negated",
    "activation first",
}
TIGHTER = {"negated": 0.02}  # the slope below a leaky ReLU is the one that leaves less area
# In l2 neurons at a padded border are bounded here without the weights that meet the padding.
TIGHTER_L2 = {"shared, before activation": 0.1, "large kernels": 0.4, "pools added": 0.05}


def network(name: str) -> tuple[nn.Module, Tensor]:
    shape, build = NETS[name]
    torch.manual_seed(1)
    net = build().eval()
    net(torch.zeros(2, *shape))
    random_statistics(net)
    return net, torch.rand(2, *shape)


def better(net: nn.Module, x: Tensor, p: float, eps: float, method: str, low: Tensor, up: Tensor) -> Tensor:
    """How much tighter our bounds are, in units of the largest bound."""
    with torch.no_grad():
        own = compute_bounds(net, x, eps, norm=p, method=method.lower())
    assert own.upper is not None
    return torch.stack([own.lower - low, up - own.upper]) / torch.maximum(low.abs().max(), up.abs().max())


@pytest.mark.parametrize("name", [n for n in NETS if n not in NO_MODULE])
@pytest.mark.parametrize("p,eps", [(math.inf, 0.05), (2.0, 0.3)])
def test_equals_auto_lirpa(name: str, p: float, eps: float) -> None:
    net, x = network(name)
    if p == 2 and name in NO_L2:
        pytest.skip("auto_LiRPA has no l2 bounds of this network, or loses its radius")
    methods = ["IBP"]
    if name not in NO_CROWN:
        methods += ["CROWN-IBP"] + ["CROWN"] * (name not in NO_CROWN_PASS)
    for method, bounds in auto_lirpa_bounds(name, net, x, p, eps, methods):
        gap = better(net, x, p, eps, method, *bounds)
        assert gap.min() >= -1e-6, (method, gap.min())
        room = TIGHTER.get(name, 0.0) if p == math.inf else TIGHTER_L2.get(name, 0.0)
        assert gap.max() <= max(room, 1e-6), (method, gap.max())


@pytest.mark.parametrize("name", ["normalised input", "activation first"])
def test_its_l2_intervals_behind_other_layers_are_no_bounds(name: str) -> None:
    """Why these are left out: points of the set lie outside its bounds, and inside ours."""
    net, x = network(name)
    ((_, (low, up)),) = auto_lirpa_bounds(name, net, x, 2.0, 0.3, ["IBP"])
    with torch.no_grad():
        own = compute_bounds(net, x, 0.3, norm=2, method="ibp")
        z = net.double()(points_of_set(x.double(), 0.3, 2.0, None, 2000).flatten(0, 1)).view(2000, 2, -1)
    assert own.upper is not None
    assert (z.amin(0) < low - 1e-3).any() or (z.amax(0) > up + 1e-3).any()
    assert (z.amin(0) >= own.lower - 1e-6).all() and (z.amax(0) <= own.upper + 1e-6).all()


@pytest.mark.parametrize("name", ["mlp-sigmoid", "mlp-tanh", "residual-sigmoid", "mlp-leaky_relu"])
@pytest.mark.parametrize("p,eps", [(math.inf, 0.05), (2.0, 0.2)])
def test_smooth_networks(name: str, p: float, eps: float) -> None:
    """Intervals are equal. Lines are others, of least area: on the mean no looser by 0.1 %."""
    net, shape = make(name)
    x = torch.rand(3, *shape)
    if p == 2 and name.startswith("residual"):
        pytest.skip("auto_LiRPA loses the l2 radius behind the normalisation of the input")
    for method, bounds in auto_lirpa_bounds(name, net, x, p, eps, ["IBP", "CROWN-IBP", "CROWN"]):
        gap = better(net, x, p, eps, method, *bounds)
        if method == "IBP":
            assert gap.abs().max() <= 1e-6
            continue
        assert gap.mean() >= -1e-3 and gap.min() >= -0.02, (method, gap.mean(), gap.min())
