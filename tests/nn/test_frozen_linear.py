"""The linear layers of frozen models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastrobust as fr


@pytest.mark.parametrize("shape", [(5, 12), (5, 6, 12), (5, 7, 12)])
def test_the_norm_behind_a_masked_linear_layer_is_folded(shape):
    """Rows of images by one product; with positions, where the normalisation is over another dimension, as it is."""
    torch.manual_seed(3)
    norm = nn.BatchNorm1d(shape[1] if len(shape) == 3 else 7)
    layer = nn.Linear(12, 7)
    model = fr.nn.convert(nn.Sequential(layer, norm), 0.4, 1.0)
    norm = model[1]
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        norm.weight.uniform_(-1, 1), norm.bias.uniform_(-1, 1)
    model.eval()
    frozen = fr.nn.freeze(model)
    x = torch.randn(shape)
    for path in ("dense", "sparse"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FASTROBUST_BINARY", path)
            got, want = (torch.autograd.functional.vjp(f, x, torch.ones_like(model(x))) for f in (frozen, model))
        assert torch.allclose(got[0], want[0], atol=1e-5)
        assert torch.allclose(got[1], want[1], atol=1e-5)
    units = {u.name: u for region in frozen.regions.values() for u in region.units}
    assert (units["0"].scale is not None) == (len(shape) == 2)


def test_a_linear_layer_that_is_called_twice_keeps_its_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(self.layer(self.layer(x)))

    torch.manual_seed(4)
    model = fr.nn.convert(Twice(), 0.5, 1.0)
    model.norm.running_mean.uniform_(-1, 1)
    model.eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.allclose(fr.nn.freeze(model)(x), model(x), atol=1e-5)
