"""Losses: value and gradient against float64 autograd, ties, extreme logits, and derivatives through autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastrobust import ops
from fastrobust.reference import losses as reference

LEAST = {"cross_entropy": 1, "margin_loss": 2, "dlr_loss": 3, "dlr_targeted_loss": 4, "kl_divergence": 1}
NAMES = tuple(LEAST)
CLASSES = (1, 2, 3, 4, 10, 16, 17, 1000)
seeds = st.integers(0, 2**31)


def inputs(name: str, seed: int, batch: int, classes: int, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=g)
    if name == "kl_divergence":
        return logits, scale * torch.randn(batch, classes, generator=g)
    labels = torch.randint(0, classes, (batch,), generator=g)
    if name != "dlr_targeted_loss":
        return logits, labels
    return logits, labels, torch.randint(0, classes, (batch,), generator=g)


def oracle(name: str, logits: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 autograd of the plain definition."""
    z = logits.detach().double().requires_grad_()
    value = getattr(reference, name)(z, *(o.double() if o.is_floating_point() else o for o in others))
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds, batch=st.sampled_from([0, 1, 3, 7, 16]))
def test_value_and_gradient(name, classes, dtype, seed, batch) -> None:
    if classes < LEAST[name]:
        return
    logits, *others = inputs(name, seed, batch, classes)
    others = [o.to(dtype) if o.is_floating_point() else o for o in others]
    loss = getattr(ops, name)(logits.to(dtype), *others)
    value, grad = oracle(name, logits, *others)
    assert loss.value.shape == (batch,) and loss.grad.shape == logits.shape
    assert loss.value.dtype == loss.grad.dtype == dtype
    # DLR divides by a difference of logits: relative to the size of its terms
    size = grad.abs().amax(1, keepdim=True).clamp_min(1) if batch else torch.ones(0, 1)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-10
    assert ((loss.value.double() - value).abs() <= tolerance * (1 + value.abs()) * size[:, 0]).all()
    assert ((loss.grad.double() - grad).abs() <= tolerance * size**2).all()


@pytest.mark.parametrize("classes", CLASSES[1:])
def test_definitions_written_out(classes) -> None:
    """The formulas of the docstrings by loops over Python floats, for the first examples."""
    logits, labels = inputs("margin_loss", 1, 5, classes)
    for name in ("cross_entropy", "margin_loss", "dlr_loss", "dlr_targeted_loss"):
        if classes < LEAST[name]:
            continue
        targets = (labels + 1) % classes
        others = (labels, targets) if name == "dlr_targeted_loss" else (labels,)
        value = getattr(ops, name)(logits, *others).value.tolist()
        for i, z in enumerate(logits.double().tolist()):
            y, order = labels[i].item(), sorted(z, reverse=True)
            rival = max(v for j, v in enumerate(z) if j != y)
            want = {
                "cross_entropy": lambda: torch.tensor(z, dtype=torch.float64).logsumexp(0).item() - z[y],  # noqa: B023
                "margin_loss": lambda: rival - z[y],  # noqa: B023
                "dlr_loss": lambda: -(z[y] - rival) / (order[0] - order[2] + 1e-12),  # noqa: B023
                "dlr_targeted_loss": lambda: -(z[y] - z[targets[i]]) / (order[0] - 0.5 * (order[2] + order[3]) + 1e-12),  # noqa: B023
            }[name]()
            assert value[i] == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_index(dtype) -> None:
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0], [5.0, 1.0, 1.0, 1.0, 1.0]], dtype=dtype
    )
    labels = torch.tensor([2, 0, 0])
    loss = ops.margin_loss(logits, labels)
    assert loss.value.tolist() == [0.0, 0.0, -4.0]
    want = torch.zeros_like(logits)
    for row, (rival, label) in enumerate(((1, 2), (1, 0), (1, 0))):
        want[row, rival], want[row, label] = 1, -1
    assert torch.equal(loss.grad, want)
    # a correct label among equals: the rival is the other one
    assert torch.equal(
        ops.margin_loss(logits[:1], torch.tensor([1])).grad, torch.tensor([[0, -1, 1, 0, 0]], dtype=dtype)
    )
    dlr = ops.dlr_loss(logits[2:], labels[2:])
    torch.testing.assert_close(dlr.value, torch.tensor([-1.0], dtype=dtype))
    # z_0 - z_1 over z_0 - z_(3): numerator's rival is class 1, the third largest is class 2
    torch.testing.assert_close(dlr.grad, torch.tensor([[0.0, 0.25, -0.25, 0, 0]], dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [4, 10, 33])
def test_float32_and_float64_agree_at_ties(name, classes) -> None:
    logits, *others = inputs(name, 4, 50, classes)
    logits = logits.round()
    if name.startswith("dlr"):  # apart from a vanishing width
        logits[:, 0] += 5
    single = getattr(ops, name)(logits, *others)
    double = getattr(ops, name)(logits.double(), *(o.double() if o.is_floating_point() else o for o in others))
    torch.testing.assert_close(single.value.double(), double.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("name", ["cross_entropy", "margin_loss", "kl_divergence", "dlr_loss", "dlr_targeted_loss"])
def test_extreme_logits(name, size) -> None:
    logits, *others = inputs(name, 3, 8, 10, size)
    loss = getattr(ops, name)(logits, *others)
    value, grad = oracle(name, logits, *others)
    assert loss.value.isfinite().all() and loss.grad.isfinite().all()
    torch.testing.assert_close(loss.value.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.grad.double(), grad, rtol=1e-4, atol=1e-5)


def test_confident_predictions_keep_their_gradient() -> None:
    """p_y - 1 without cancellation: a logit that leads by 20 has the loss and gradient of 2e-9."""
    logits = torch.zeros(1, 2)
    logits[0, 0] = 12.0
    loss = ops.cross_entropy(logits, torch.tensor([0]))
    value, grad = oracle("cross_entropy", logits, torch.tensor([0]))
    torch.testing.assert_close(loss.grad.double(), grad, rtol=2e-2, atol=0)
    torch.testing.assert_close(loss.value.double(), value, rtol=2e-2, atol=0)


def test_minus_infinity_logits_have_probability_zero() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf, 0.5]])
    loss = ops.cross_entropy(logits, torch.tensor([0]))
    value, grad = oracle("cross_entropy", logits, torch.tensor([0]))
    torch.testing.assert_close(loss.value.double(), value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss.grad.double(), grad, rtol=1e-6, atol=1e-6)


def test_kl_is_zero_at_equality_and_never_negative() -> None:
    logits, other = inputs("kl_divergence", 1, 200, 10)
    same = ops.kl_divergence(logits, logits.clone())
    assert same.value.abs().max() <= 1e-6 and same.grad.abs().max() <= 1e-7
    assert (ops.kl_divergence(logits, other).value > 0).all()
    shifted = ops.kl_divergence(logits + 3, other - 5)
    torch.testing.assert_close(shifted.value, ops.kl_divergence(logits, other).value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_the_batch(name) -> None:
    logits, *others = inputs(name, 1, 33, 10)
    whole = getattr(ops, name)(logits, *others)
    for i in (0, 5, 32):
        alone = getattr(ops, name)(logits[i : i + 1], *(o[i : i + 1] for o in others))
        assert torch.equal(alone.value, whole.value[i : i + 1]) and torch.equal(alone.grad, whole.grad[i : i + 1])


@pytest.mark.parametrize("name", NAMES)
def test_strides_and_integer_types(name) -> None:
    logits, *others = inputs(name, 1, 6, 10)
    want = getattr(ops, name)(logits, *others)
    wide = torch.zeros(6, 20)
    wide[:, ::2] = logits
    for other in (wide[:, ::2], logits.t().contiguous().t(), torch._neg_view(-logits)):
        got = getattr(ops, name)(other, *others)
        assert torch.equal(got.value, want.value) and torch.equal(got.grad, want.grad)
    strided = [torch.stack([o, o], -1)[..., 0] for o in others]
    assert torch.equal(getattr(ops, name)(logits, *strided).grad, want.grad)
    if name != "kl_divergence":
        for dtype in (torch.int32, torch.int16, torch.uint8, torch.int8):
            assert torch.equal(getattr(ops, name)(logits, *(o.to(dtype) for o in others)).grad, want.grad)


# ---- autograd ----


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_in_float64(name) -> None:
    logits, *others = inputs(name, 5, 4, 6)
    others = [o.double() if o.is_floating_point() else o for o in others]
    z = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: getattr(ops, name)(z, *others).value, (z,))
    if name == "kl_divergence":
        r = others[0].requires_grad_()
        assert torch.autograd.gradcheck(lambda z, r: ops.kl_divergence(z, r).value, (z, r))
        assert torch.autograd.gradcheck(lambda r: ops.kl_divergence(z.detach(), r).value, (r,))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_is_the_returned_gradient(name, dtype) -> None:
    logits, *others = inputs(name, 5, 7, 10)
    z = logits.to(dtype).requires_grad_()
    loss = getattr(ops, name)(z, *others)
    assert loss.value.requires_grad and not loss.grad.requires_grad and loss.value.dtype == torch.float32
    weights = torch.linspace(-1, 2, 7)
    (grad,) = torch.autograd.grad((weights * loss.value).sum(), z)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, (weights[:, None] * loss.grad).to(dtype))
    # the value is that of the widened logits
    value, _ = oracle(name, z.detach().float(), *others)
    torch.testing.assert_close(loss.value.detach().double(), value, rtol=1e-4, atol=1e-4)


def test_kl_gradients_of_both_arguments() -> None:
    logits, other = inputs("kl_divergence", 5, 7, 10)
    for needs in ((True, False), (False, True), (True, True)):
        z, r = (t.clone().requires_grad_(n) for t, n in zip((logits, other), needs, strict=True))
        zd, rd = (t.double().requires_grad_(n) for t, n in zip((logits, other), needs, strict=True))
        ops.kl_divergence(z, r).value.mean().backward()
        F.kl_div(F.log_softmax(zd, 1), F.log_softmax(rd, 1), reduction="batchmean", log_target=True).backward()
        for got, want in ((z, zd), (r, rd)):
            assert (got.grad is None) == (want.grad is None)
            if want.grad is not None:
                torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-6)


def test_training_step_through_a_model() -> None:
    """Weights get the gradients that torch's own cross entropy gives."""
    torch.manual_seed(3)
    model, x, y = torch.nn.Linear(8, 5), torch.randn(16, 8), torch.randint(0, 5, (16,))
    ops.cross_entropy(model(x), y).value.mean().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modes_without_gradients(name, mode, dtype) -> None:
    logits, *others = inputs(name, 5, 3, 6)
    others = [o.to(dtype) if o.is_floating_point() else o for o in others]
    want = getattr(ops, name)(logits.to(dtype), *others)
    with mode():
        got = getattr(ops, name)(logits.to(dtype).requires_grad_(mode is torch.no_grad), *others)
    assert not got.value.requires_grad
    assert torch.equal(got.value, want.value) and torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("kind", ["plain", "strided", "int32 labels", "half", "requires grad", "nan"])
def test_unchecked_labels_give_the_same_bits(name, kind) -> None:
    """An attack's inner loop skips the checks and the dispatcher; what comes out does not change."""
    logits, *labels = inputs(name, 5, 7, 10)
    if kind == "strided":
        logits = logits.t().contiguous().t()
    elif kind == "int32 labels":
        labels = [t.int() for t in labels]
    elif kind == "half":
        logits = logits.half()
    elif kind == "nan":
        logits[2, 3] = float("nan")
    logits.requires_grad_(kind == "requires grad")
    checked, short = (getattr(ops, name)(logits, *labels, check=check) for check in (True, False))
    for a, b in zip(checked, short, strict=True):
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("name", NAMES[:4])
def test_unchecked_labels_of_a_wrong_shape_are_refused(name) -> None:
    logits, *labels = inputs(name, 5, 7, 10)
    with pytest.raises(ValueError, match=r"labels: got .*\(6,\)"):
        getattr(ops, name)(logits, labels[0][:6], *labels[1:], check=False)
    if name == "dlr_targeted_loss":
        with pytest.raises(ValueError, match=r"targets: got .*\(6,\)"):
            ops.dlr_targeted_loss(logits, labels[0], labels[1][:6], check=False)


def special_rows(classes: int, wide: int) -> torch.Tensor:
    """Rows with one logit that is no number, at the first, a middle and the last place; then one of ordinary logits."""
    z = torch.randn(13, classes, generator=torch.Generator().manual_seed(wide))
    for row, value in enumerate([float("nan"), float("inf"), float("-inf")] * 4):
        z[row, (0, classes // 2, classes - 1, 1)[row // 3] % classes] = value
    return z


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [4, 10, 16, 17, 100])
def test_rows_with_logits_that_are_no_numbers(name, classes) -> None:
    """A NaN makes its row's value and gradient NaN; infinities give what the definition gives; other rows know
    nothing."""
    z = special_rows(classes, classes)
    _, *others = inputs(name, 8, 13, classes)
    loss = getattr(ops, name)(z, *others)
    assert loss.value[::3][:4].isnan().all() and loss.grad[::3][:4].isnan().all()
    want, grad = oracle(name, z, *others)
    assert torch.equal(loss.value.isnan(), want.isnan())
    finite = want.isfinite()
    torch.testing.assert_close(loss.value[finite].double(), want[finite], rtol=1e-5, atol=1e-5)
    assert torch.equal(loss.value[want.isinf()].double(), want[want.isinf()])
    closed = reference.gradient(name, z.double(), *(o.double() if o.is_floating_point() else o for o in others))
    torch.testing.assert_close(loss.grad.double(), closed, rtol=1e-4, atol=1e-5, equal_nan=True)
    alone = getattr(ops, name)(z[12:], *(o[12:] for o in others))
    assert torch.equal(alone.value, loss.value[12:]) and torch.equal(alone.grad, loss.grad[12:])
    assert loss.value[12].isfinite() and torch.allclose(grad[12], loss.grad[12].double(), atol=1e-5)


def test_softmax_of_nothing_but_infinities_does_not_exist() -> None:
    z, y = torch.full((2, 5), float("-inf")), torch.tensor([0, 3])
    for loss in (
        ops.cross_entropy(z, y),
        ops.kl_divergence(z, torch.zeros(2, 5)),
        ops.kl_divergence(torch.zeros(2, 5), z),
    ):
        assert loss.value.isnan().all() and loss.grad.isnan().all()


def test_a_step_does_not_follow_a_row_without_a_loss() -> None:
    x = torch.full((2, 5), 0.5)
    z = torch.tensor([[0.1, float("nan"), 0.2, 0.0, 0.0], [0.1, 0.3, 0.2, 0.0, 0.0]])
    y = ops.pgd_step(x, x, ops.cross_entropy(z, torch.tensor([0, 0])).grad, 0.1, 0.2)
    assert torch.equal(y[0], x[0]) and not torch.equal(y[1], x[1])
