"""The adversarial loss as a function of the weights (thesis section 4.2.3): gradient norms, the top of the Hessian's
spectrum, surfaces, and how far the adversarial examples turn as the weights move.

``attack`` is a callable(model, x, y) that returns the adversarial examples; it is run anew wherever the weights move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, cross_entropy

from ._weights import Attack, Batches, copied, flat, loss_at, noise, put


class Eigenpairs(NamedTuple):
    """``values`` (k,), largest first; ``vectors`` (k, parameters), unit length, of any sign, in the order of
    ``parameters()``;
    ``residuals`` (k,) = ||H v - value v||, zero where converged; ``products`` Hessian-vector products spent."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


def hessian_eigenpairs(
    model: nn.Module, x: Tensor, y: Tensor, k: int = 1, steps: int = 50, seed: int = 0
) -> Eigenpairs:
    """The k algebraically largest eigenpairs of the Hessian, over the weights, of the mean cross-entropy at (x, y), in
    evaluation mode, by Lanczos with full reorthogonalisation. Give adversarial examples as x for the adversarial loss
    (held fixed). Memory: 2 * ``steps`` vectors of the parameters' size. Fewer than k pairs come back where the space
    that the start spans is smaller (few parameters, or an eigenvalue many times over). The model is left as it was."""
    if not 1 <= k <= steps:
        raise ValueError(f"k: got {k}, expected 1 to steps ({steps})")
    params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with torch.enable_grad():
            loss = cross_entropy(functional_call(model, (params, buffers), (x.detach(),)), y)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            gradient = torch.cat([g.flatten() for g in grads])
    finally:
        for module, training in modes:
            module.training = training

    def product(v: Tensor) -> Tensor:
        found = torch.autograd.grad(gradient, list(params.values()), v, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(gradient.numel(), generator=draw, dtype=torch.float64).to(gradient)
    basis, images = [q / q.norm()], []
    for _ in range(min(steps, gradient.numel())):
        w = product(basis[-1])
        images.append(w)
        size = w.norm()
        known = torch.stack(basis)
        for _ in range(2):  # once leaves rounding errors that grow into copies of the top pair
            w = w - known.T @ (known @ w)
        if w.norm() <= 10 * torch.finfo(w.dtype).eps * size:
            break  # the space is invariant: its pairs are exact
        basis.append(w / w.norm())
    known, image = torch.stack(basis[: len(images)]), torch.stack(images)
    small = known @ image.T
    values, inner = torch.linalg.eigh((small + small.T) / 2)
    values, inner = values.flip(0)[:k], inner.flip(1)[:, :k]
    vectors = inner.T @ known
    residuals = (inner.T @ image - values[:, None] * vectors).norm(dim=1)
    return Eigenpairs(values.detach(), vectors.detach(), residuals.detach(), len(images))


def gradient_norms(model: nn.Module, batches: Batches, attack: Attack, *, seed: int = 0) -> Tensor:
    """(batches,) l2 norms of the gradient over the weights of each batch's mean adversarial cross-entropy, in
    evaluation mode (thesis figures 4.3 and 4.4)."""
    other, norms = copied(model), []
    with noise(model, seed):
        for x, y, *_ in batches:
            adv = attack(other, x, y).detach()
            with torch.enable_grad():
                value = cross_entropy(other(adv), y)
                grads = torch.autograd.grad(value, list(other.parameters()), materialize_grads=True)
            norms.append(torch.stack([g.norm() for g in grads]).norm())
    return torch.stack(norms)


class Updates(NamedTuple):
    """Of each update: ``norms`` (n,) of the batch's gradient, ``errors`` (n,) of the batch under attack, a share, and
    ``distances`` (n,) = ||theta - theta_0|| after it."""

    norms: Tensor
    errors: Tensor
    distances: Tensor


def first_updates(
    model: nn.Module, batches: Batches, attack: Attack, *, updates: int = 100, lr: float = 0.01, seed: int = 0
) -> Updates:
    """Plain SGD on the adversarial loss from the model's weights, in a copy that trains on batch statistics and is
    attacked in evaluation mode: how fast it leaves its start (thesis figure 4.3). ``batches`` is gone through again as
    often as ``updates`` wants."""
    other, start = copied(model), flat(model)
    params = list(other.parameters())
    rows: list[list[Tensor]] = []
    with noise(model, seed):
        while len(rows) < updates:
            before = len(rows)
            for x, y, *_ in batches:
                if len(rows) == updates:
                    break
                adv = attack(other, x, y).detach()
                other.train()
                with torch.enable_grad():
                    logits = other(adv)
                    grads = torch.autograd.grad(cross_entropy(logits, y), params, materialize_grads=True)
                other.eval()
                norm = torch.stack([g.norm() for g in grads]).norm()
                with torch.no_grad():
                    for p, g in zip(params, grads, strict=True):
                        p.sub_(g, alpha=lr)
                rows.append([norm, (logits.argmax(1) != y).to(norm).mean(), (flat(other) - start).norm()])
            if len(rows) == before:
                raise ValueError("batches: got none, expected at least one")
    return Updates(*(torch.stack(column) for column in zip(*rows, strict=True)))


def surface(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, directions: Tensor, steps: Sequence[float], *, seed: int = 0
) -> Tensor:
    """The mean adversarial loss at theta + a_1 v_1 (+ a_2 v_2) for a_i in ``steps`` (n of them): (n,) for directions
    (1, P), (n, n) for (2, P), the first direction along the rows (thesis figure 4.6)."""
    if directions.dim() != 2 or directions.shape[0] not in (1, 2):
        raise ValueError(f"directions: got shape {tuple(directions.shape)}, expected (1, P) or (2, P)")
    other, theta = copied(model), flat(model)
    with noise(model, seed):
        found = [
            [loss_at(other, theta + a * directions[0] + b * directions[-1], x, y, attack) for b in steps]
            if len(directions) == 2
            else loss_at(other, theta + a * directions[0], x, y, attack)
            for a in steps
        ]
    return torch.tensor(found, dtype=theta.dtype)


def perturbation_cosines(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, direction: Tensor, steps: Sequence[float], runs: int = 4,
    *, seed: int = 0,
) -> Tensor:  # fmt: skip
    """(n,) the cosine between the perturbations found at theta + a v and at theta - a v, for a in ``steps``: the mean
    over the examples and over ``runs`` runs of an attack with a random start (thesis figure 4.7). Zero perturbations
    count 0."""
    other, theta = copied(model), flat(model)
    delta = lambda weights: (attack(put(other, weights), x, y) - x).flatten(1)
    with noise(model, seed):  # one stream: every run of an attack without a seed starts elsewhere
        found = [
            torch.stack(
                [
                    cosine_similarity(delta(theta + a * direction), delta(theta - a * direction)).mean()
                    for _ in range(runs)
                ]
            ).mean()
            for a in steps
        ]
    return torch.stack(found)


def plot_eigenvalues(values: dict[str, Tensor], figure: Any) -> None:
    """A line of eigenvalues, largest first, for each name."""
    axes = figure.subplots()
    for name, line in values.items():
        axes.semilogy(range(1, len(line) + 1), line.clamp_min(1e-6).tolist(), "o-", label=name, markersize=3)
    axes.set(xlabel="number", ylabel="Hessian eigenvalue")
    axes.legend(fontsize=7)
