"""Bad input: the error names the argument, what came and what is expected, and nothing is modified."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastrobust import ops

X = torch.full((3, 2, 4), 0.5)
LOGITS, LABELS = torch.randn(3, 5), torch.tensor([0, 1, 4])

# argument -> (bad value, type of error, what the message must hold beside the argument's name)
STEP_CASES: list[tuple[str, Any, type[Exception], str]] = [
    ("x", None, TypeError, "NoneType"),
    ("x", np.zeros((3, 2, 4), np.float32), TypeError, "ndarray"),
    ("x", [[0.5]], TypeError, "list"),
    ("x", torch.zeros(3, 2, 4, dtype=torch.uint8), TypeError, "uint8.*float32.*scale"),
    ("x", torch.zeros(3, 2, 4, dtype=torch.int64), TypeError, "int64.*float32"),
    ("x", torch.zeros(3, 2, 4, dtype=torch.bool), TypeError, "bool.*float32"),
    ("x", torch.zeros(3, 2, 4, dtype=torch.float16), TypeError, "float16.*float32"),
    ("x", torch.zeros(3, 2, 4, dtype=torch.complex64), TypeError, "complex64.*float32"),
    ("x", torch.tensor(0.5), ValueError, "0-dimensional.*first dimension"),
    ("x", torch.zeros(3, 2, 4).to_sparse(), TypeError, "sparse.*dense"),
    ("x", torch.nested.nested_tensor([torch.zeros(2, 4)] * 3), TypeError, "nested.*dense"),
    ("x0", torch.zeros(3, 2, 4).to_sparse(), TypeError, "sparse.*dense"),
    ("x0", torch.nested.nested_tensor([torch.zeros(2, 4)] * 3), TypeError, "nested.*dense"),
    ("x0", torch.zeros(3, 2, 5), ValueError, r"\(3, 2, 5\).*\(3, 2, 4\)"),
    ("x0", torch.zeros(2, 4), ValueError, r"\(2, 4\).*\(3, 2, 4\)"),
    ("x0", torch.zeros(3, 2, 4, dtype=torch.float64), TypeError, "float64.*float32"),
    ("x0", torch.zeros(3, 2, 4, device="meta"), ValueError, "meta.*cpu"),
    ("x0", None, TypeError, "NoneType"),
    ("grad", torch.zeros(3, 2, 1), ValueError, r"\(3, 2, 1\).*\(3, 2, 4\)"),
    ("grad", torch.zeros(3, 2, 4, dtype=torch.int32), TypeError, "int32.*float32"),
    ("grad", torch.zeros(3, 2, 4, dtype=torch.float64), TypeError, "float64.*float32"),
    ("grad", torch.zeros(3, 2, 4, device="meta"), ValueError, "meta.*cpu"),
    ("grad", torch.zeros(3, 2, 4).to_sparse(), TypeError, "sparse.*dense"),
    ("grad", torch.nested.nested_tensor([torch.zeros(2, 4)] * 3), TypeError, "nested.*dense"),
    ("grad", torch.zeros(3, 2, 4, dtype=torch.complex64), TypeError, "complex64.*float32"),
    ("grad", np.zeros((3, 2, 4), np.float32), TypeError, "ndarray.*from_numpy"),
    ("grad", None, TypeError, "NoneType"),
    ("step_size", -0.1, ValueError, "-0.1.*>= 0"),
    ("step_size", math.nan, ValueError, "nan.*>= 0"),
    ("step_size", "big", TypeError, "str.*number"),
    ("step_size", None, TypeError, "NoneType.*number"),
    ("step_size", True, TypeError, "bool.*number"),
    ("step_size", 1j, TypeError, "complex.*number"),
    ("step_size", torch.tensor([0.1, -0.1, 0.1]), ValueError, "negative or NaN.*>= 0"),
    ("step_size", torch.zeros(2), ValueError, r"\(2,\).*\(3,\)"),
    ("step_size", torch.zeros(3, dtype=torch.int64), TypeError, "int64.*floating"),
    ("eps", -1.0, ValueError, "-1.0.*>= 0"),
    ("eps", -1, ValueError, "-1.*>= 0"),
    ("eps", math.nan, ValueError, "nan.*>= 0"),
    ("eps", "8/255", TypeError, "str.*number"),
    ("eps", None, TypeError, "NoneType.*number"),
    ("eps", [0.1, "a", 0.1], TypeError, "list.*number"),
    ("eps", [[0.1], [0.1, 0.2]], TypeError, "list.*number"),
    ("eps", [0.1, -0.1, 0.1], ValueError, "negative or NaN.*>= 0"),
    ("eps", np.array(["a", "b", "c"]), TypeError, "array.*number"),
    ("eps", np.array([True, False, True]), TypeError, "bool.*number"),
    ("eps", np.zeros(4), ValueError, r"\(4,\).*\(3,\)"),
    ("eps", torch.zeros(3).to_sparse(), TypeError, "sparse.*dense"),
    ("step_size", torch.zeros(3, dtype=torch.complex64), TypeError, "complex64.*floating"),
    ("eps", torch.tensor([0.1, math.nan, 0.1]), ValueError, "negative or NaN.*>= 0"),
    ("eps", torch.tensor(-0.1), ValueError, "negative or NaN.*>= 0"),
    ("eps", torch.zeros(4), ValueError, r"\(4,\).*\(3,\)"),
    ("eps", torch.zeros(2, 1, 1), ValueError, r"\(2, 1, 1\).*\(3,\)"),
    ("eps", torch.zeros(3, 1, 4, 1), ValueError, r"\(3, 1, 4, 1\).*\(3,\)"),
    ("eps", torch.zeros(3, device="meta"), ValueError, "meta.*cpu"),
    ("norm", 3.7, ValueError, "3.7.*1, 2 or inf"),
    ("norm", 0, ValueError, "0.*1, 2 or inf"),
    ("norm", -math.inf, ValueError, "-inf.*1, 2 or inf"),
    ("norm", "L3", ValueError, "L3.*1, 2 or inf"),
    ("norm", None, ValueError, "NoneType.*1, 2 or inf"),
    ("norm", [2], ValueError, "list.*1, 2 or inf"),
    ("clip", (1, 0), ValueError, r"1.*0.*lo <= hi"),
    ("clip", (1.0, 0.0), ValueError, r"1.*0.*lo <= hi"),
    ("clip", (math.nan, 1.0), ValueError, "nan.*lo <= hi"),
    ("clip", (0.0, math.nan), ValueError, "nan.*lo <= hi"),
    ("clip", (0.0,), TypeError, r"tuple.*\(lo, hi\) or None"),
    ("clip", (0.0, 0.5, 1.0), TypeError, r"tuple.*\(lo, hi\) or None"),
    ("clip", ("a", "b"), TypeError, r"tuple.*\(lo, hi\) or None"),
    ("clip", (None, 1.0), TypeError, r"tuple.*\(lo, hi\) or None"),
    ("clip", "images", TypeError, r"str.*\(lo, hi\) or None"),
    ("clip", (0.1, 0.1), ValueError, "no float32 number between"),
    ("clip", ({}, 1.0), TypeError, "tuple"),
    ("clip", (torch.zeros(2, 1), torch.full((2, 1), -0.1)), ValueError, "lower faces above.*lo <= hi"),
    ("clip", (torch.full((2, 1), math.nan), 1.0), ValueError, "NaN.*lo <= hi"),
    ("clip", (torch.zeros(5, 1), 1.0), ValueError, r"\(5, 1\).*\(3, 2, 4\)"),
    ("clip", (torch.zeros(2), torch.ones(2)), ValueError, r"\(2,\).*\(3, 2, 4\)"),
    ("clip", (np.zeros((2, 1)), np.array([["a"], ["b"]])), TypeError, "array.*number or a tensor"),
    ("clip", (torch.zeros(2, 1, dtype=torch.bool), 1.0), TypeError, "bool.*real"),
    ("clip", (torch.zeros(2, 1, device="meta"), 1.0), ValueError, "meta.*cpu"),
    ("clip", 1.0, TypeError, r"float.*\(lo, hi\) or None"),
    ("active", torch.ones(3), TypeError, "float32.*bool"),
    ("active", torch.ones(4, dtype=torch.bool), ValueError, r"\(4,\).*\(3,\)"),
    ("active", torch.ones(3, 1, dtype=torch.bool), ValueError, r"\(3, 1\).*\(3,\)"),
    ("active", [True, False, True], TypeError, "list.*tensor"),
    ("active", torch.ones(3, dtype=torch.bool, device="meta"), ValueError, "meta.*cpu"),
]
OUT_CASES: list[tuple[Any, type[Exception], str]] = [
    (torch.zeros(3, 2, 5), ValueError, r"\(3, 2, 5\).*\(3, 2, 4\)"),
    (torch.zeros(2, 3, 4), ValueError, r"\(2, 3, 4\).*\(3, 2, 4\)"),
    (torch.zeros(3, 2, 4, dtype=torch.float64), TypeError, "float64.*float32"),
    (torch.zeros(3, 2, 4, dtype=torch.float16), TypeError, "float16.*float32"),
    (torch.zeros(3, 2, 4, device="meta"), ValueError, "meta.*cpu"),
    (np.zeros((3, 2, 4), np.float32), TypeError, "ndarray.*tensor"),
]


def step_arguments() -> dict[str, Any]:
    return {
        "x": X.clone(),
        "x0": X.clone() - 0.1,
        "grad": torch.ones_like(X),
        "step_size": 0.1,
        "eps": 0.3,
        "norm": math.inf,
        "clip": (0.0, 1.0),
        "active": None,
    }


def raises(call: Callable[[], Any], name: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, message
    assert message.startswith(f"{name}: got "), message
    assert "expected" in message and re.search(text, message, re.DOTALL), message


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
@pytest.mark.parametrize(("name", "value", "error", "text"), STEP_CASES, ids=lambda v: str(v)[:24].replace("\n", " "))
def test_step(norm, name, value, error, text) -> None:
    arguments = step_arguments()
    if name != "norm":
        arguments["norm"] = norm
    arguments[name] = value
    dense = lambda v: isinstance(v, torch.Tensor) and v.device.type == "cpu" and not v.is_nested  # noqa: E731
    kept = {k: v.clone() for k, v in arguments.items() if dense(v)}
    for in_place in (False, True):
        out = arguments["x"] if in_place and isinstance(arguments["x"], torch.Tensor) else torch.full_like(X, 7.0)
        raises(lambda: ops.pgd_step(**arguments, out=out), name, error, text)  # noqa: B023
        assert in_place or (out == 7).all()
    raises(lambda: ops.pgd_step(**arguments), name, error, text)
    raises(lambda: ops.pgd_step_fosc(**arguments, threshold=0.1), name, error, text)
    raises(lambda: ops.atas_step(**arguments, v=torch.zeros(3)), name, error, text)
    if name not in ("step_size", "active", "clip"):
        raises(lambda: ops.fosc(**{k: arguments[k] for k in ("x", "x0", "grad", "eps", "norm")}), name, error, text)
    if name not in ("step_size", "active", "grad"):
        raises(lambda: ops.project(**{k: arguments[k] for k in ("x", "x0", "eps", "norm", "clip")}), name, error, text)
    if name in ("eps", "norm", "clip"):
        raises(
            lambda: ops.random_start(X, **{k: arguments[k] for k in ("eps", "norm", "clip")}, seed=1), name, error, text
        )
    for k, v in kept.items():
        torch.testing.assert_close(arguments[k], v, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm", [math.inf, 2])
@pytest.mark.parametrize(("out", "error", "text"), OUT_CASES, ids=lambda v: str(v)[:20].replace("\n", " "))
def test_out(norm, out, error, text) -> None:
    arguments = step_arguments() | {"norm": norm}
    raises(lambda: ops.pgd_step(**arguments, out=out), "out", error, text)
    raises(lambda: ops.project(arguments["x"], arguments["x0"], 0.1, norm, out=out), "out", error, text)
    if isinstance(out, torch.Tensor) and out.device.type == "cpu":
        assert (out == 0).all()


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
@pytest.mark.parametrize("eps", [math.inf, torch.tensor([0.1, math.inf, 0.2])])
def test_fosc_of_an_infinite_radius(norm, eps) -> None:
    """It would be infinite, or no number where a gradient coordinate is zero: then an example would stop without a
    word."""
    arguments = step_arguments() | {"norm": norm, "eps": eps}
    raises(lambda: ops.pgd_step_fosc(**arguments, threshold=0.1), "eps", ValueError, "infinite.*finite")
    fosc = {k: arguments[k] for k in ("x", "x0", "grad", "eps", "norm")}
    raises(lambda: ops.fosc(**fosc), "eps", ValueError, "infinite.*finite")


@pytest.mark.parametrize("norm", [math.inf, 2, 1])
@pytest.mark.parametrize("size", [24, 4096])
def test_out_that_overlaps_an_input(norm, size) -> None:
    """Only x itself may be overwritten: any other overlap would be read after it is written."""
    memory = torch.rand(3 * size)
    before = memory.clone()
    part = lambda start: memory[start : start + size].view(2, size // 2)  # noqa: E731
    other, grad = torch.rand(2, size // 2), torch.rand(2, size // 2)
    clashes = [{"x": other, "x0": part(0), "grad": grad, "out": part(s)} for s in (0, 1, 4, size - 1)]
    clashes += [{"x": part(s), "x0": other, "grad": grad, "out": part(7)} for s in (0, 6, 8, size)]
    clashes += [{"x": other, "x0": grad, "grad": part(s), "out": part(7)} for s in (0, 7, size)]
    for c in clashes:
        out = c.pop("out")
        with pytest.raises(ValueError, match="^out: got .*memory.*expected"):
            ops.pgd_step(**c, step_size=0.1, eps=0.3, norm=norm, out=out)
        assert torch.equal(memory, before)
    ops.pgd_step(part(0), part(size), part(2 * size), 0.1, 0.3, norm, out=part(0))  # neighbours are fine
    assert torch.equal(memory[size:], before[size:]) and not torch.equal(memory[:size], before[:size])


def test_out_with_one_place_for_several_elements() -> None:
    with pytest.raises((ValueError, RuntimeError), match="memory"):
        ops.pgd_step(X, X, X, 0.1, 0.1, out=torch.zeros(1, 2, 4).expand(3, 2, 4))


def test_per_element_parameters_need_linf() -> None:
    for norm in (2, 1):
        for name in ("step_size", "eps"):
            arguments = step_arguments() | {"norm": norm, name: torch.full_like(X, 0.1)}
            raises(lambda: ops.pgd_step(**arguments), name, ValueError, "per element.*per example")  # noqa: B023
    arguments = step_arguments() | {"step_size": torch.full_like(X, 0.1)}
    raises(lambda: ops.atas_step(**arguments, v=torch.zeros(3)), "step_size", ValueError, "per element.*per example")


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("v", torch.zeros(2), ValueError, r"\(2,\).*\(3,\)"),
        ("v", torch.zeros(3, dtype=torch.float64), ValueError, "float64.*float32"),
        ("v", 0.0, TypeError, "float.*tensor"),
        ("beta", 1.5, ValueError, "1.5.*0 to 1"),
        ("beta", -0.1, ValueError, "-0.1.*0 to 1"),
        ("beta", "x", TypeError, "str.*number"),
        ("c", -1.0, ValueError, "-1.*from 0"),
        ("c", math.nan, ValueError, "nan"),
        ("variant", "mine", ValueError, "mine.*'paper' or 'authors'"),
        ("step_range", (0.2, 0.1), ValueError, "0.2.*0.1"),
        ("step_range", 0.1, TypeError, "float"),
    ],
)
def test_atas(name, value, error, text) -> None:
    arguments = step_arguments() | {"v": torch.zeros(3), name: value}
    raises(lambda: ops.atas_step(**arguments), name, error, text)


def test_atas_authors_need_a_positive_constant() -> None:
    raises(
        lambda: ops.atas_step(**step_arguments(), v=torch.zeros(3), c=0, variant="authors"), "c", ValueError, "0.*> 0"
    )


@pytest.mark.parametrize(
    ("value", "error"), [(None, TypeError), ("x", TypeError), (torch.tensor(0.1), TypeError), (math.nan, ValueError)]
)
def test_threshold(value, error) -> None:
    raises(lambda: ops.pgd_step_fosc(**step_arguments(), threshold=value), "threshold", error, "number")


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("x0", torch.zeros(3, 2, dtype=torch.uint8), TypeError, "uint8.*float32"),
        ("x0", None, TypeError, "NoneType"),
        ("seed", 1.5, TypeError, "float.*integer"),
        ("seed", True, TypeError, "bool.*integer"),
        ("seed", "1", TypeError, "str.*integer"),
        ("seed", 2**64, ValueError, "64 bits"),
        ("seed", -(2**63) - 1, ValueError, "64 bits"),
        ("first_example", -1, ValueError, "-1.*0 to 2"),
        ("first_example", 2**32 - 2, ValueError, "0 to 2"),
        ("first_example", 0.5, TypeError, "float.*integer"),
        ("first_example", "a", TypeError, "str.*integer"),
        ("eps", math.inf, ValueError, "infinite.*finite"),
        ("eps", torch.tensor([0.1, math.inf, 0.2]), ValueError, "infinite.*finite"),
    ],
)
def test_random_start(name, value, error, text) -> None:
    for norm in (math.inf, 2, 1):
        arguments = {"x0": X, "eps": 0.1, "norm": norm, "clip": None, "seed": 1, "first_example": 0} | {name: value}
        raises(lambda: ops.random_start(**arguments), name, error, text)  # noqa: B023


# ---- losses ----

LEAST = {"cross_entropy": 1, "margin_loss": 2, "dlr_loss": 3, "dlr_targeted_loss": 4}


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize(
    ("argument", "value", "error", "text"),
    [
        ("logits", None, TypeError, "NoneType.*tensor"),
        ("logits", torch.zeros(3, 5, dtype=torch.int64), TypeError, "int64.*floating"),
        ("logits", torch.zeros(5), ValueError, r"\(5,\).*\(batch, classes\)"),
        ("logits", torch.zeros(3, 5, 2), ValueError, r"\(3, 5, 2\).*\(batch, classes\)"),
        ("labels", [0, 1, 2], TypeError, "list.*tensor"),
        ("labels", torch.zeros(3), TypeError, "float32.*integer"),
        ("labels", torch.zeros(3, dtype=torch.bool), TypeError, "bool.*integer"),
        ("labels", torch.zeros(2, dtype=torch.int64), ValueError, r"\(2,\).*\(3,\)"),
        ("labels", torch.zeros(3, 1, dtype=torch.int64), ValueError, r"\(3, 1\).*\(3,\)"),
        ("labels", torch.zeros(3, dtype=torch.int64, device="meta"), ValueError, "meta.*cpu"),
        ("labels", torch.tensor([0, 5, 1]), ValueError, "0 to 5.*0 to 4"),
        ("labels", torch.tensor([0, -1, 1]), ValueError, "-1 to 1.*0 to 4"),
    ],
)
def test_losses(name, argument, value, error, text) -> None:
    arguments = {"logits": LOGITS, "labels": LABELS} | {argument: value}
    if name == "dlr_targeted_loss":
        arguments["targets"] = (LABELS + 1) % 5
    raises(lambda: getattr(ops, name)(**arguments), argument, error, text)
    if name == "dlr_targeted_loss" and argument == "labels":
        raises(lambda: ops.dlr_targeted_loss(LOGITS, LABELS, value), "targets", error, text)


@pytest.mark.parametrize("name", ["margin_loss", "dlr_loss", "dlr_targeted_loss"])
def test_losses_need_enough_classes(name) -> None:
    few = LEAST[name] - 1
    others = [torch.zeros(3, dtype=torch.int64)] * (2 if name == "dlr_targeted_loss" else 1)
    raises(lambda: getattr(ops, name)(torch.zeros(3, few), *others), "logits", ValueError, f"{few} classes.*{few + 1}")


@pytest.mark.parametrize(
    "value", [None, [1.0], torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, device="meta")]
)
def test_kl_reference(value) -> None:
    error = ValueError if isinstance(value, torch.Tensor) else TypeError
    raises(lambda: ops.kl_divergence(LOGITS, value), "reference", error, "tensor|logits")


def test_label_check_can_be_skipped() -> None:
    assert torch.equal(ops.cross_entropy(LOGITS, LABELS, check=False).grad, ops.cross_entropy(LOGITS, LABELS).grad)
