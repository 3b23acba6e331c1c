"""Bad input: a ValueError or TypeError that names the argument, before the model is called or anything is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import classes, compat


def _bad() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    x, y = h.small_batch(4)
    nan = x.clone()
    nan[1, 0, 0, 0] = math.nan
    return {
        "x not a tensor": ({"x": x.numpy()}, TypeError, r"(?s)x: got .*ndarray.*expected a tensor"),
        "integer images": (
            {"x": (x * 255).byte()},
            TypeError,
            r"x: got .*uint8.*expected float32.*scale integer images",
        ),
        "complex images": ({"x": x.to(torch.complex64)}, TypeError, r"x: got .*complex64.*expected float32"),
        "no batch dimension": ({"x": x[0, 0, 0]}, ValueError, r"x: got shape \(5,\), expected a batch"),
        "scalar x": ({"x": x[0, 0, 0, 0]}, ValueError, r"x: got a 0-dimensional"),
        "sparse x": ({"x": x.to_sparse()}, TypeError, r"x: got .*sparse.*expected a strided"),
        "x above the box": (
            {"x": x * 255},
            ValueError,
            r"x: got values from 0 to 255, expected values in clip = \(0, 1\)",
        ),
        "x below the box": ({"x": x - 0.5}, ValueError, r"x: got values from -0.5 .*clip = \(0, 1\)"),
        "NaN in x": ({"x": nan}, ValueError, r"x: got values from nan"),
        "half x outside": ({"x": (x * 2).half()}, ValueError, r"x: got values from 0 to 2"),
        "y not a tensor": ({"y": [0, 1, 2, 3]}, TypeError, r"y: got list.*expected a tensor"),
        "float labels": ({"y": y.float()}, TypeError, r"y: got .*float32.*expected integer class indices"),
        "too few labels": ({"y": y[:3]}, ValueError, r"y: got shape \(3,\), expected \(4,\)"),
        "one-hot labels": ({"y": torch.eye(5).long()[y]}, ValueError, r"y: got shape \(4, 5\), expected \(4,\)"),
        "y on another device": ({"y": y.to("meta")}, ValueError, r"y: got device meta, expected cpu"),
        "no y, targeted": ({"y": None, "targeted": True}, ValueError, r"y: got None, expected the classes to reach"),
        "no y, targets": ({"y": None, "targets": "all"}, ValueError, r"y: got None, expected"),
        "negative eps": ({"eps": -0.1}, ValueError, r"eps: got -0.1, expected a number >= 0"),
        "NaN eps": ({"eps": math.nan}, ValueError, r"eps: got nan, expected a number >= 0"),
        "infinite eps": ({"eps": math.inf}, ValueError, r"eps: got inf, expected a finite"),
        "eps a string": ({"eps": "8/255"}, TypeError, r"eps: got str '8/255', expected a number"),
        "eps a flag": ({"eps": True}, TypeError, r"eps: got bool True, expected a number"),
        "eps None": ({"eps": None}, TypeError, r"eps: got NoneType None, expected a number"),
        "integer eps tensor": (
            {"eps": torch.ones(4, dtype=torch.int64)},
            TypeError,
            r"eps: got .*int64.*floating-point",
        ),
        "eps for 3 of 4": ({"eps": torch.ones(3)}, ValueError, r"eps: got shape \(3,\), expected a number, .*\(4,\)"),
        "a negative eps of 4": ({"eps": torch.tensor([0.1, -0.1, 0.1, 0.1])}, ValueError, r"eps: got negative or NaN"),
        "eps per element for L2": (
            {"eps": torch.ones_like(x), "norm": 2},
            ValueError,
            r"eps: got one value per element.*norm 2",
        ),
        "negative step": ({"step_size": -0.1}, ValueError, r"step_size: got -0.1, expected a number >= 0"),
        "step a string": ({"step_size": "a"}, TypeError, r"step_size: got str 'a', expected a number"),
        "step for 3 of 4": ({"step_size": torch.ones(3)}, ValueError, r"step_size: got shape \(3,\), expected"),
        "unknown norm": ({"norm": 3}, ValueError, r"norm: got int 3, expected 1, 2 or inf"),
        "unknown norm name": ({"norm": "L0"}, ValueError, r"norm: got str 'L0', expected 1, 2 or inf"),
        "lo > hi": ({"clip": (1, 0)}, ValueError, r"clip: got \(1.0, 0.0\), expected lo <= hi"),
        "clip a number": ({"clip": 1.0}, TypeError, r"clip: got float 1.0, expected \(lo, hi\)"),
        "negative steps": ({"steps": -1}, ValueError, r"steps: got -1, expected at least 0"),
        "steps a float": ({"steps": 2.0}, TypeError, r"steps: got float 2.0, expected an integer"),
        "no restarts": ({"restarts": 0}, ValueError, r"restarts: got 0, expected at least 1"),
        "restarts a flag": ({"restarts": True}, TypeError, r"restarts: got bool True, expected an integer"),
        "unknown keep": ({"keep": "first"}, ValueError, r"keep: got 'first', expected 'last' or 'best'"),
        "unknown loss": ({"loss": "mse"}, ValueError, r"loss: got 'mse', expected one of ce, margin"),
        "loss a number": ({"loss": 3}, TypeError, r"loss: got int, expected a name or a callable"),
        "targeted kl": ({"loss": "kl", "targeted": True}, ValueError, r"loss: got 'kl'"),
        "targeted dlr without truth": (
            {"loss": "dlr", "targeted": True},
            ValueError,
            r"targeted: got True with loss 'dlr'",
        ),
        "targeted and targets": (
            {"targeted": True, "targets": "all"},
            ValueError,
            r"targets: got a multi-targeted attack",
        ),
        "targets a word": ({"targets": "some"}, ValueError, r"targets: got 'some', expected 'all'"),
        "no targets": ({"targets": 0}, ValueError, r"targets: got 0, expected 'all'"),
        "targets of another shape": (
            {"targets": y},
            ValueError,
            r"targets: got \(4,\).*expected integer classes of shape \(4, T\)",
        ),
        "no column of targets": ({"targets": y[:, None][:, :0]}, ValueError, r"targets: got \(4, 0\)"),
        "float targets": ({"targets": y[:, None].float()}, ValueError, r"targets: got .*float32.*expected integer"),
        "unknown mode": ({"model_mode": "train"}, ValueError, r"model_mode: got 'train', expected 'eval' or 'keep'"),
        "seed a float": ({"seed": 1.5}, TypeError, r"seed: got float 1.5, expected an integer or None"),
        "seed a word": ({"seed": "1", "y": None}, TypeError, r"seed: got str '1', expected an integer or None"),
        "normalize with one value": ({"normalize": (0.5,)}, TypeError, r"normalize: got tuple.*expected \(mean, std\)"),
        "normalize by zero": ({"normalize": (0.5, 0.0)}, ValueError, r"normalize: got std 0.0, expected values > 0"),
        "normalize other channels": (
            {"normalize": ([0.5] * 3, [0.5] * 3)},
            ValueError,
            r"normalize: got 3 values of mean.*\(2\)",
        ),
        "autocast a word": ({"autocast": "bf16"}, TypeError, r"autocast: got str 'bf16', expected torch.float16"),
    }


def _arguments(bad: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    x, y = h.small_batch(4)
    options = {"eps": 0.1, "steps": 2, **bad}
    return options.pop("x", x), options.pop("y", y), options


@pytest.mark.parametrize("attack", ["pgd", "ifgsm"])
@pytest.mark.parametrize("case", list(_bad()))
def test_refused_before_the_model_is_called(case: str, attack: str) -> None:
    bad, kind, message = _bad()[case]
    x, y, options = _arguments(bad)
    before = x.clone() if isinstance(x, Tensor) else x.copy()
    model = h.Watch(h.small_model()).train()
    with pytest.raises(kind, match=message):
        getattr(fr.attacks, attack)(model, x, y, **options)
    assert model.sizes == [] and all(m.training for m in model.modules())
    same = torch.equal(x.nan_to_num(), before.nan_to_num()) if isinstance(x, Tensor) and not x.is_sparse else True
    assert same


@pytest.mark.parametrize("labels", [[0, 1, 2, 5], [0, -1, 2, 3]])
@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 0, "return_details": True}, {"loss": "kl"}, {"targets": "all"}, {"restarts": 2}, {"targeted": True}],
    ids=str,
)
def test_labels_out_of_range(labels: list[int], options: dict[str, Any]) -> None:
    """Known after one forward pass: the number of classes is the model's."""
    x, _ = h.small_batch(4)
    model = h.Watch(h.small_model())
    with pytest.raises(ValueError, match=r"y: got class indices from -?\d to \d, expected 0 to 4 \(5 classes\)"):
        fr.attacks.pgd(model, x, torch.tensor(labels), **{"eps": 0.1, "steps": 2, **options})
    assert model.sizes == [4 * options.get("restarts", 1)]  # of so few, the restarts are made at once


def test_targets_out_of_range() -> None:
    x, y = h.small_batch(4)
    with pytest.raises(ValueError, match="targets: got class indices from 0 to 9, expected 0 to 4"):
        fr.attacks.pgd(h.small_model(), x, y, eps=0.1, targets=torch.tensor([[0], [1], [9], [2]]))


@pytest.mark.parametrize("model", [None, 3, "resnet"])
def test_model_not_callable(model: Any) -> None:
    x, y = h.small_batch(4)
    with pytest.raises(TypeError, match="model: got .*expected an nn.Module or a callable"):
        fr.attacks.pgd(model, x, y, eps=0.1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, r"model: returned \(4, 2, 6, 5\) .*expected logits of shape \(4, classes\)"),
        (lambda x: x.flatten(1)[:2], r"model: returned \(2, 60\)"),
        (lambda x: (x.flatten(1), x), r"model: returned tuple"),
        (lambda x: x.flatten(1).detach(), r"model: returned logits without a gradient"),
    ],
    ids=["four dimensions", "other batch", "tuple", "detached"],
)
def test_what_the_model_returns(answer: Any, message: str) -> None:
    x, y = h.small_batch(4)
    with pytest.raises(ValueError, match=message):
        fr.attacks.pgd(answer, x, y, eps=0.1)


ATTACKS = ("fgsm", "pgd", "apgd", "fab", "square", "cw_inf", "cw_l2", "deepfool", "malt", "autoattack")


@pytest.mark.parametrize("attack", ATTACKS)
def test_one_logit_is_no_classification(attack: str) -> None:
    """It is always the largest: every attack would find the model robust. Made to two, it is attacked."""
    x, y = h.small_batch(4, classes=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 1))
    options: dict[str, Any] = {} if attack in ("cw_l2", "deepfool") else {"eps": 0.5}
    run = getattr(fr.attacks, attack)
    with pytest.raises(
        ValueError, match=r"model: returned \(4, 1\) .*at least 2 classes; .*output=lambda z: torch.cat"
    ):
        run(model, x, y * 0, **options)
    both = lambda z: torch.cat([torch.zeros_like(z), z], 1)
    y = both(model(x)).argmax(1)
    adv = run(model, x, y, output=both, **options)
    assert bool((both(model(adv)).argmax(1) != y).any())


def test_one_output_of_a_loss_of_ones_own() -> None:
    x, _ = h.small_batch(4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 1))
    adv = fr.attacks.pgd(model, x, torch.zeros(4), eps=0.1, loss=lambda z, y: z[:, 0])
    assert bool((model(adv) > model(x)).all())


@pytest.mark.parametrize("kind", ["PGD", "MultiAttack", "AutoAttack"])
@pytest.mark.parametrize("bad", ["inputs", "labels"])
@pytest.mark.parametrize("convert", [Tensor.numpy, Tensor.tolist])
def test_classes_of_others_want_tensors(kind: str, bad: str, convert: Any) -> None:
    x, y = h.small_batch(4)
    model = h.small_model()
    one = classes.PGD(model, steps=1)
    call: Any = {
        "PGD": one,
        "MultiAttack": classes.MultiAttack([one, classes.PGD(model, steps=2)]),
        "AutoAttack": compat.AutoAttack(model, eps=0.1, verbose=False).run_standard_evaluation,
    }[kind]
    name = f"{bad}" if kind != "AutoAttack" else {"inputs": "x_orig", "labels": "y_orig"}[bad]
    with pytest.raises(TypeError, match=rf"{name}: got .*expected a tensor"):
        call(*((convert(x), y) if bad == "inputs" else (x, convert(y))))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, y: z, r"loss: returned \(4, 5\), expected one value per example"),
        (lambda z, y: 1.0, r"loss: returned float"),
    ],
    ids=["matrix", "number"],
)
def test_what_the_loss_returns(loss: Any, message: str) -> None:
    x, y = h.small_batch(4)
    with pytest.raises(ValueError, match=message):
        fr.attacks.pgd(h.small_model(), x, y, eps=0.1, loss=loss)


def test_too_few_classes_for_dlr() -> None:
    x, y = h.small_batch(4, classes=2)
    with pytest.raises(ValueError, match="logits: got 2 classes, expected at least 3 for dlr_loss; use margin_loss"):
        fr.attacks.pgd(h.small_model(2), x, y, eps=0.1, loss="dlr")


def test_fgsm_takes_no_steps() -> None:
    x, y = h.small_batch(4)
    with pytest.raises(TypeError, match="steps: fgsm takes one step"):
        fr.attacks.fgsm(h.small_model(), x, y, eps=0.1, steps=3)
