"""Frozen models of random programs of ordinary PyTorch code compute what the models compute in eval mode, or refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrobust as fr
from frozen_programs import Plan, network, plans

EXAMPLES = 10 * settings().max_examples


def outcome(model: nn.Module, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Outputs and the gradient of a sum of them; None where torch does not differentiate the model."""
    with torch.no_grad():
        plain = tree_leaves(model(x.clone()))
    given = x.clone().requires_grad_()
    outs = tree_leaves(model(given.clone()))
    weights = [torch.linspace(-1, 1, o.numel()).view(o.shape) for o in outs]
    total = sum((o * w).sum() for o, w in zip(outs, weights, strict=True))
    try:
        (grad,) = torch.autograd.grad(total, given, allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "does not require grad" in str(error)
        return plain, None
    grad = torch.zeros_like(given) if grad is None else grad
    assert all(torch.equal(o.isnan(), p.isnan()) for o, p in zip(outs, plain, strict=True))
    return plain, grad


@settings(max_examples=EXAMPLES)
@given(plan=plans, batches=st.lists(st.sampled_from([1, 2, 3, 8, 13, 21]), min_size=2, max_size=3))
@example(Plan([("conv0", 0, 0), ("alias", 0, 0), ("iadd", 0, 1), ("conv2", 1, 0)], 1, "plain", "maps", False), [3, 8])
@example(Plan([("gradless", 0, 0), ("half overwritten", 0, 1)], 2, "plain", "logits", False), [3, 1])
@example(Plan([("add", 0, 0), ("add", 0, 1), ("half overwritten", 0, 2)], 0, "plain", "logits", False), [1, 1])
def test_random_programs(plan: Plan, batches: list[int]) -> None:
    model = network(plan)
    modes = [m.training for m in model.modules()]
    frozen = fr.nn.freeze(model)
    truth = copy.deepcopy(model).eval() if plan.wrapping != "patched" else network(plan._replace(training=False))
    for batch in batches:
        x = torch.rand(batch, 2, 6, 6, generator=torch.Generator().manual_seed(batch))
        want, want_grad = outcome(truth, x)
        got, got_grad = outcome(frozen, x)
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert g.shape == w.shape and g.dtype == w.dtype
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4 * float(w.abs().max()) + 1e-6)
        if want_grad is None:
            continue
        if got_grad is None:  # nothing that it has learns, and x is detached
            assert not want_grad.any()
            continue
        # Sums that are zero up to rounding may fall on either side of a kink, in an example or two.
        far = (got_grad - want_grad).flatten(1).norm(dim=1) > 1e-3 * want_grad.flatten(1).norm(dim=1) + 1e-6
        assert far.sum() <= batch // 4
    assert [m.training for m in model.modules()] == modes


def test_the_flags_of_an_update_are_those_of_the_frozen_model() -> None:
    plan = Plan([("conv0", 0, 0), ("flag", 0, 0), ("norm", 0, 0), ("relu_", 0, 0)], 3, "plain", "logits", False)
    model = network(plan)
    frozen, x = fr.nn.freeze(model), torch.rand(4, 2, 6, 6)
    before = model(x)
    torch.testing.assert_close(frozen(x), before)
    model.flags["scale"] = 4.0
    with torch.no_grad():
        model.spread.mul_(2)
    more = torch.cat([x, x, x])
    torch.testing.assert_close(frozen(x), before)  # as it was, also for batches that come for the first time
    torch.testing.assert_close(frozen(more)[:4], before)
    frozen.update()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(frozen(x), before)
    torch.testing.assert_close(frozen(x), model(x))
    torch.testing.assert_close(frozen(more), model(more))
