"""What mypy must accept and refuse of calls of the attacks; see tests/attacks/test_types.py. Not run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import fastrobust as fr


def accepted(model: nn.Module, x: Tensor, y: Tensor, flag: bool) -> None:
    a: Tensor = fr.attacks.pgd(model, x, y, eps=0.1, steps=np.int64(3), norm="L2", loss="margin", seed=0)
    b: fr.attacks.AttackResult = fr.attacks.pgd(model, x, eps=torch.rand(4), return_details=True)
    c: Tensor = fr.attacks.fgsm(model, x, y, eps=np.full(4, 0.1), mask=x > 0, levels=256)
    d: Tensor = fr.attacks.ifgsm(
        model, x, y, eps=[0.1, 0.2], clip=None, loss=lambda z, t: (z - t).square().mean(1)
    ).sum()
    e: fr.attacks.AttackResult = fr.attacks.fgsm(lambda t: (model(t), t), x, y, eps=0.1, output=0, return_details=True)
    f: Tensor | fr.attacks.AttackResult = fr.attacks.pgd(model, x, y, eps=0.1, return_details=flag)
    g: Tensor = fr.attacks.apgd(model, x, y, eps=0.1, targets=9, loss="dlr", first_example=[1, 2])
    i: fr.attacks.AttackResult = fr.attacks.fab(model, x, y, norm=2, return_details=True)
    j: Tensor = fr.attacks.square(model, x, y, eps=0.1, queries=np.int64(9))
    k: fr.attacks.EvaluationReport = fr.attacks.autoattack(
        model, x, y, eps=0.1, version=["apgd-ce", ("square", {"queries": 10})], return_details=True
    ).report
    m: Tensor = fr.attacks.cw_inf(model, x, y, eps=0.1, step_size=0.01, keep="best")
    n: fr.attacks.AttackResult = fr.attacks.cw_l2(model, x, y, eps=[0.5, 1.0], confidence=1.0, return_details=True)
    o: Tensor = fr.attacks.deepfool(model, x, norm="L1", candidates=np.int64(5))
    p: Tensor | fr.attacks.AttackResult = fr.attacks.malt(model, x, y, eps=0.1, targets=3, return_details=flag)
    q: Tensor = fr.attacks.classes.PGD(model, eps=0.1)(x, y)
    r: Tensor = fr.attacks.compat.MultiAttack([fr.attacks.classes.FGSM(model), fr.attacks.compat.CW(model)])(x, y)
    del a, b, c, d, e, f, g, i, j, k, m, n, o, p, q, r


def refused(model: nn.Module, x: Tensor, y: Tensor) -> None:
    fr.attacks.fgsm(model, x, y, eps=0.1, nonsense=3)  # type: ignore[call-overload]
    fr.attacks.fgsm(model, x, y, eps=0.1, steps=3)  # type: ignore[call-overload]
    fr.attacks.ifgsm(model, x, y, eps=0.1, alpha=0.01)  # type: ignore[call-overload]
    fr.attacks.pgd(model, x, y)  # type: ignore[call-overload]
    fr.attacks.pgd(model, x, y, eps=0.1, loss="mse")  # type: ignore[call-overload]
    fr.attacks.pgd(model, x, y, eps=0.1, keep="first")  # type: ignore[call-overload]
    fr.attacks.pgd(model, x, y, eps="8/255")  # type: ignore[arg-type]
    fr.attacks.apgd(model, x, y, eps=0.1, step_size=0.1)  # type: ignore[call-overload]
    fr.attacks.square(model, x, y, eps=0.1, loss="dlr")  # type: ignore[call-overload]
    fr.attacks.cw_inf(model, x, y, eps=0.1, loss="ce")  # type: ignore[call-overload]
    fr.attacks.cw_l2(model, x, y, norm=2)  # type: ignore[call-overload]
    fr.attacks.deepfool(model, x, y, eps=0.1)  # type: ignore[call-overload]
    fr.attacks.malt(model, x, y, eps=0.1, loss="kl")  # type: ignore[call-overload]
    fr.attacks.classes.PGD(model, iters=3)  # type: ignore[call-arg]
    fr.attacks.classes.NIFGSM(model)  # type: ignore[attr-defined]
    fr.attacks.autoattack(model, x, y, eps=0.1, version=3)  # type: ignore[call-overload]
    _: Tensor = fr.attacks.pgd(model, x, y, eps=0.1, return_details=True)  # type: ignore[assignment]
