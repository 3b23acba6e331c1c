"""Adversarial Robustness Toolbox (Nicolae et al. 2018): PGD in torch without random start.

Fastest configuration with the same result: the torch implementation rather than the numpy one, the whole input as
one batch, no progress bar, a model whose parameters ask for no gradient. Arrays go in and come out as numpy, as the
library wants them; it measures its success after each attack whether asked or not, which is part of what a caller
waits for. Its L2 step clips to the box first and to the ball second; the paper's order is the other one.
"""

from __future__ import annotations

import torch

from ..case import Call
from . import require


def pgd(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, *, norm: float, eps: float, step_size: float, steps: int
) -> Call:
    install = "adversarial-robustness-toolbox"
    estimators = require("art.estimators.classification.pytorch", install)
    attacks = require("art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch", install)
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    classifier = estimators.PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if x.device.type == "cuda" else "cpu",
    )
    attack = attacks.ProjectedGradientDescentPyTorch(
        classifier,
        norm=norm,
        eps=eps,
        eps_step=step_size,
        max_iter=steps,
        num_random_init=0,
        batch_size=len(x),
        verbose=False,
    )
    images = x.cpu().numpy()
    labels = torch.nn.functional.one_hot(y, classes).float().cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(images, labels))
