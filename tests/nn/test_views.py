"""Tensors that frozen models read through views, whatever the layout of the tensor that is there."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrobust._places import place_of
from fastrobust.nn._views import looking, overlaying


def chained(data: st.DataObject, t: Tensor) -> Tensor:
    """A view of a view of t."""
    for kind in data.draw(
        st.lists(
            st.sampled_from(["permute", "slice", "step", "select", "split", "flat", "expand", "strided"]), max_size=4
        )
    ):
        d = data.draw(st.integers(0, max(0, t.dim() - 1)))
        if kind == "permute":
            t = t.permute(data.draw(st.permutations(range(t.dim()))))
        elif kind == "expand":
            t = t.unsqueeze(d).expand(*t.shape[:d], 2, *t.shape[d:])
        elif kind == "flat" and t.is_contiguous():
            t = t.view(-1)
        elif kind == "strided" and t.is_contiguous() and t.numel() > 4:
            t = t.as_strided((t.numel() - 3, 2), (1, 2), t.storage_offset())
        elif t.dim() and t.shape[d] > 1:
            if kind == "slice":
                t = t.narrow(d, 1, t.shape[d] - 1)
            elif kind == "step":
                t = t[(slice(None),) * d + (slice(data.draw(st.integers(0, 1)), None, 2),)]
            elif kind == "select":
                t = t.select(d, data.draw(st.integers(0, t.shape[d] - 1)))
            elif kind == "split" and t.shape[d] % 2 == 0:
                t = t.unflatten(d, (2, t.shape[d] // 2))
    return t


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def base(data: st.DataObject) -> tuple[Tensor, Tensor]:
    """A tensor in memory of any order, some of it left out, and the same numbers in another order."""
    size = data.draw(sizes)
    order = data.draw(st.permutations(range(len(size))))
    back = [list(order).index(d) for d in range(len(size))]
    t = torch.arange(1.0, 1 + torch.Size(size).numel()).view([size[d] for d in order]).permute(back)
    if data.draw(st.booleans()):
        wide = torch.zeros(*t.shape, 2)
        wide[..., 1] = t
        t = wide[..., 1]
    return t, t.clone(memory_format=torch.contiguous_format)


@given(st.data())
def test_a_view_shows_the_same_elements_of_another_layout(data: st.DataObject) -> None:
    recorded, other = base(data)
    part = chained(data, recorded)
    look = looking(place_of(recorded), place_of(part))
    other.requires_grad_()
    shown = other if look is None else look(other)
    assert shown.shape == part.shape and torch.equal(shown, part)
    (grad,) = torch.autograd.grad(shown.sum(), other)
    assert torch.equal(grad, torch.stack([(part == v).sum() for v in other.flatten()]).view(other.shape).float())


@given(st.data())
def test_a_write_into_a_view(data: st.DataObject) -> None:
    recorded, other = base(data)
    part = chained(data, recorded)
    if any(s == 0 for s in part.stride()) or torch.unique(part).numel() != part.numel():
        return  # torch does not write into memory that shows twice
    new = -torch.arange(1.0, 1 + part.numel()).view(part.shape)
    other.requires_grad_(), new.requires_grad_()
    got = overlaying(place_of(recorded), place_of(part))(other, new)
    part.copy_(new.detach())
    assert torch.equal(got, recorded)
    grads = torch.autograd.grad(got.sum(), (other, new), allow_unused=True)
    assert torch.equal(grads[0], (recorded > 0).float()) and torch.equal(grads[1], torch.ones_like(new))
