"""Feature maps in the fast layout for the tests of its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrobust.nn._schedule import Schedule, pooling_sizes
from fastrobust.ops.binary import _feature_maps as fm
from fastrobust.ops.binary._activation import NONE, RELU, Act

ACTS = (
    NONE, RELU, Act("leaky_relu", 0.1), Act("leaky_relu", -0.3), Act("hardtanh", -1, 2), Act("hardtanh", 0, 6),
    Act("silu"), Act("gelu"), Act("gelu_tanh"), Act("hardswish"), Act("elu", 1), Act("elu", 0.3), Act("tanh"),
    Act("sigmoid"), Act("hardsigmoid"), Act("softplus", 1, 20), Act("softplus", 2, 5), Act("softplus", 0.5, 200),
    Act("mish"),
)  # fmt: skip
act_ids = [f"{act.kind}-{act.a}-{act.b}" for act in ACTS]


def empty_lists(maps: fm.Maps) -> fm.Plan:
    """Sums of nothing: what remains is what follows a sum."""
    ptr = torch.zeros(2 * maps.channels + 1, dtype=torch.int32)
    return fm.Plan(ptr, ptr[:0], maps.channels)


def laid(x: Tensor, maps: fm.Maps) -> Tensor:
    return fm.to_maps(x, maps, torch.full((maps.blocks * maps.block + fm.SLACK,), 7.0))


def plain(data: Tensor, maps: fm.Maps) -> Tensor:
    return fm.from_maps(data, maps, torch.empty(maps.size))


def beside_pixels(data: Tensor, maps: fm.Maps) -> Tensor:
    """What the planes hold beside the pixels of images, the room of images that are not there not counted."""
    ones = laid(torch.ones(maps.blocks * maps.lanes, *maps.size[1:]), whole(maps))
    return data[: maps.blocks * maps.block][ones[: maps.blocks * maps.block] == 0]


def whole(maps: fm.Maps) -> fm.Maps:
    """The same maps of as many images as there are lanes for."""
    return fm.Maps(
        maps.blocks * maps.lanes, maps.channels, maps.height, maps.width, maps.lanes, maps.pitch, maps.halo, maps.lead
    )


def finished(x: Tensor, maps: fm.Maps, **after: Any) -> Tensor:
    """What follows a sum, applied to plain x; tensors named in `after` are plain too, pre and slopes are filled."""
    given = {k: laid(v, maps) if k == "gate" else v for k, v in after.items()}
    kept = {k: torch.full((maps.blocks * maps.block + fm.SLACK,), 7.0) for k in ("pre", "slopes") if k in after}
    nothing = torch.zeros(maps.blocks * maps.block + fm.SLACK)
    out = torch.full_like(nothing, 7.0)
    fm.gather(nothing, maps, maps, empty_lists(maps), residual=laid(x, maps), out=out, **{**given, **kept})
    if after.get("act", NONE) == NONE:
        kept.pop("slopes", None)  # there are none
    for name, data in {**kept, "out": out}.items():
        assert not beside_pixels(data, maps).any(), f"borders of {name}"
    for name, data in kept.items():
        after[name].copy_(plain(data, maps))
    return plain(out, maps)


def pooled(
    x: Tensor, grad: Tensor, source: fm.Maps, target: fm.Maps, window: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Max pooling of plain x: the result, the number of the pixel taken, and the gradient for that of the result."""
    data, kept = laid(x, source), torch.full((target.blocks * target.block + fm.SLACK,), 7.0)
    out, where = kept.clone(), torch.full(kept.shape, 77, dtype=torch.uint8)
    dx, given = torch.full_like(data, 7.0), laid(grad, target)
    device, stream = fm.device_of(x)
    for number in (0, where.data_ptr()):
        s = Schedule()
        a, b = (s.given(shape=(1,), strides=(1,)) for _ in range(2))
        steps = fm.new_program()
        steps.max_pool(
            a.address, b.address, number, *pooling_sizes(source, target), window, target.plane
        )  # fmt: skip
        steps.run(device, stream, [0, data.data_ptr(), out.data_ptr()])
        kept, out = out, kept
    assert torch.equal(plain(kept, target).nan_to_num(9), plain(out, target).nan_to_num(9)), "with and without numbers"
    steps = fm.new_program()
    steps.max_pool_grad(
        given.data_ptr(), where.data_ptr(), dx.data_ptr(), *pooling_sizes(source, target), window, source.plane
    )
    steps.run(device, stream, [])
    for name, d, maps in (("out", out, target), ("out", kept, target), ("dx", dx, source)):
        assert not beside_pixels(d, maps).any(), f"borders of {name}"
    return plain(out, target), plain(where.float(), target).long(), plain(dx, source)
