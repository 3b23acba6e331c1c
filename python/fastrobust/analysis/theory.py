"""Statements of the thesis that can be checked with numbers (chapters 4 and 5): the two sides and the margin.

Rows of ``x`` are examples; binary labels ``y`` are -1 or +1. Everything is numpy in float64. Theorems 5.1 and 5.2 are in
:mod:`fastrobust.analysis.subnetwork`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]
_DUAL = {2.0: 2.0, math.inf: 1.0, 1.0: math.inf}


class Sides(NamedTuple):
    """``left`` <= ``right`` is what is stated; ``margin`` is at least 0 (to rounding) where it holds."""

    left: Array
    right: Array
    margin: float


def theorem_4_1(w: ArrayLike, x: ArrayLike, y: ArrayLike, eps: tuple[float, float]) -> Sides:
    """Curvature of the adversarial logistic loss (4.2) grows with the budget: eigenvalues at eps[0] <= those at eps[1].

    The margin is the smallest eigenvalue of the difference of the Hessians, which speaks of every direction m.
    That the data are separable is not enough for the proof: w itself must separate them with margin eps[1], since
    s (1 - s) grows with the budget only on that side.

    Raises:
        ValueError: eps not ascending, or a w that does not separate with margin eps[1].
    """
    w, x, y = _floats(w), _floats(x), _floats(y)
    least = float((y * (x @ w)).min())
    if not eps[0] <= eps[1] <= least:
        raise ValueError(f"eps: got {eps}, expected two ascending ones up to the margin of w, {least:.4g}")
    low, high = (_curvature(w, x, y, e) for e in eps)
    return Sides(np.linalg.eigvalsh(low), np.linalg.eigvalsh(high), float(np.linalg.eigvalsh(high - low)[0]))


def _curvature(w: Array, x: Array, y: Array, eps: float) -> Array:
    s = _sigmoid(y * (x @ w) - eps)
    return (x.T * (s * (1 - s))) @ x / len(x)


def theorem_4_2(weights: ArrayLike, x: ArrayLike, label: int, *, p: float = math.inf) -> tuple[float, Sides]:
    """From the budget eps_bar of the proof on, a linear model is no better than a constant one: log K <= loss at x + Delta.

    weights: (K, M); x: (M,). Answers eps_bar = (log(K - 1) - <w_m - w_y, x>) / ||w_m - w_y||_q and the sides there, with
    Delta of length eps_bar along w_m - w_y, where w_m is the row farthest from w_y.
    eps_bar grows without bound as the weights shrink, so it is none for every W, which the theorem asks for; eps = ||x||_p
    is (Delta = -x gives equal logits).
    """
    weights, x = _floats(weights), _floats(x)
    q = _dual(p)
    d = weights - weights[label]
    norms = np.linalg.norm(d, q, axis=1)
    m = int(norms.argmax())
    if not norms[m] > 0:
        raise ValueError("weights: got equal rows, expected a row that is not that of the label")
    bar = float((math.log(len(d) - 1) - d[m] @ x) / norms[m])
    delta = max(bar, 0.0) * _steepest(d[m], p)
    return max(bar, 0.0), _sides([math.log(len(d))], [float(np.logaddexp.reduce(d @ (x + delta)))])


def _steepest(d: Array, p: float) -> Array:
    """The vector of l_p norm 1 with the largest product with d."""
    if p == math.inf:
        return np.sign(d)
    if p == 1.0:
        return np.where(np.arange(len(d)) == np.abs(d).argmax(), np.sign(d), 0.0)
    return d / np.linalg.norm(d)


def proposition_4_2(w1: ArrayLike, w2: ArrayLike, x: ArrayLike, y: ArrayLike, eps: float) -> Sides:
    """(4.11) of the logistic loss under an l2 budget: |L(w1) - L(w2)| <= L_t d and ||grad L(w1) - grad L(w2)|| <=
    L_tt d + 2 eps L_tx, with d = ||w1 - w2||.

    The constants of Assumption 4.1 over the inputs that the budget reaches: with R = max ||x|| + eps, L_t = R,
    L_tt = R^2 / 4, L_tx = 1 + max ||w|| R / 4.
    """
    w1, w2, x, y = _floats(w1), _floats(w2), _floats(x), _floats(y)
    (a, grad_a), (b, grad_b) = (adversarial_logistic(w, x, y, eps) for w in (w1, w2))
    reach, apart = float(np.linalg.norm(x, axis=1).max()) + eps, float(np.linalg.norm(w1 - w2))
    cross = 1 + max(np.linalg.norm(w1), np.linalg.norm(w2)) * reach / 4
    left = [abs(a - b), float(np.linalg.norm(grad_a - grad_b))]
    return _sides(left, [reach * apart, reach**2 / 4 * apart + 2 * eps * float(cross)])


def adversarial_logistic(w: ArrayLike, x: ArrayLike, y: ArrayLike, eps: float) -> tuple[float, Array]:
    """mean log(1 + exp(-y <w, x> + eps ||w||_2)) and its gradient in w (0 for the norm's at w = 0).

    The log loss: the thesis prints a sigmoid for it in 4.3.3.
    """
    w, x, y = _floats(w), _floats(x), _floats(y)
    norm = float(np.linalg.norm(w))
    z = y * (x @ w) - eps * norm
    pull = _sigmoid(-z)
    direction = w / norm if norm else np.zeros_like(w)
    return float(np.logaddexp(0, -z).mean()), -(pull * y) @ x / len(x) + pull.mean() * eps * direction


def max_margin(x: ArrayLike, y: ArrayLike, *, sweeps: int = 100_000, tolerance: float = 1e-10) -> Array:
    """The shortest w with y_i <w, x_i> >= 1 (4.33), by coordinate ascent in the dual.

    Raises:
        ValueError: no such w within the sweeps: the data are not separable through the origin, or nearly so.
    """
    rows = _floats(x) * _floats(y)[:, None]
    squares, a, w = (rows**2).sum(axis=1), np.zeros(len(rows)), np.zeros(rows.shape[1])
    if not (squares > 0).all():
        raise ValueError("x: got an example that is 0, expected ones that a plane through the origin separates")
    for _ in range(sweeps):
        for i, row in enumerate(rows):
            change = max((1 - row @ w) / squares[i], -a[i])
            a[i] += change
            w = w + change * row
        slack = rows @ w - 1
        if slack.min() > -tolerance and np.abs(a * slack).max() < tolerance * max(1.0, a.max()):
            return w
    raise ValueError(f"x: got data without a margin within {sweeps} sweeps, expected separable ones")


def lemma_4_2(x: ArrayLike, y: ArrayLike, eps: float) -> tuple[Array, Sides]:
    """The max-margin vector under an l2 budget (4.35), w' = w / (1 - eps ||w||), collinear with that without one, and its
    constraints: 1 <= y <w', x> - eps ||w'|| for every example, with equality for the support vectors.

    Raises:
        ValueError: data that are not separable under the budget.
    """
    w = max_margin(x, y)
    room = 1 - eps * float(np.linalg.norm(w))
    if room <= 0:
        raise ValueError(f"eps: got {eps}, expected less than the data's margin, {1 / np.linalg.norm(w):.4g}")
    robust = w / room
    reached = _floats(y) * (_floats(x) @ robust) - eps * np.linalg.norm(robust)
    return robust, _sides(np.ones(len(reached)), reached)


def theorem_4_4(x: ArrayLike, y: ArrayLike, eps: float, *, steps: int = 10_000, record: int = 10) -> Array:
    """Cosine of the weights of adversarial logistic regression with the max-margin direction, at ``record`` points of
    gradient descent spaced by a constant factor: it tends to 1 as one over the logarithm of the steps.

    The step size is 1 / ||X||^2, of the sum of the losses.
    """
    x, y = _floats(x), _floats(y)
    goal = max_margin(x, y)
    if eps * np.linalg.norm(goal) >= 1:
        raise ValueError(f"eps: got {eps}, expected less than the data's margin, {1 / np.linalg.norm(goal):.4g}")
    points = set(np.unique(np.geomspace(1, steps, record).astype(int)).tolist())
    w, found, size = np.zeros(x.shape[1]), [], len(x) / np.linalg.norm(x, 2) ** 2
    for step in range(1, steps + 1):
        w = w - size * adversarial_logistic(w, x, y, eps)[1]
        if step in points:
            found.append(w @ goal / np.linalg.norm(w) / np.linalg.norm(goal))
    return np.array(found)


def lemma_4_3(
    w: ArrayLike, eta: ArrayLike, r: float, eps: float, *, draws: int = 100_000, seed: int = 0
) -> tuple[float, float, float]:
    """Error of a linear classifier under an l2 attack on N(y r eta, I) (4.39): measured on draws, the closed form
    Psi(r <w, eta> / ||w|| - eps), and the standard error of the first."""
    w, eta = _floats(w), _floats(eta)
    random, wrong, left = np.random.default_rng(seed), 0, draws
    while left:
        count = min(left, 10_000)
        # all labels +1, as the distribution is symmetric; the attack takes eps ||w|| off the margin
        points = r * eta + random.standard_normal((count, len(w)))
        wrong += int((points @ w - eps * np.linalg.norm(w) < 0).sum())
        left -= count
    exact = _tail(r * float(w @ eta) / float(np.linalg.norm(w)) - eps)
    return wrong / draws, exact, math.sqrt(max(exact * (1 - exact), 1 / draws) / draws)


def robust_error(
    r: float, eps: float, modes: Sequence[float], shares: Sequence[float], c: tuple[float, float]
) -> float:
    """R(r, eps) of Theorem 4.5 (4.38) without the o(r^2): training on the mode r, tests on all ``modes``."""
    inner = c[0] - 1 / (c[1] * r**2)
    if inner < 0:
        raise ValueError(
            f"r: got {r}, expected at least {1 / math.sqrt(c[0] * c[1]):.4g}, from where (4.38) is a number"
        )
    return sum(share * _tail(mode * math.sqrt(inner) - eps) for mode, share in zip(modes, shares, strict=True))


def corollary_4_2(
    pair: tuple[float, float], eps: tuple[float, float], modes: Sequence[float], shares: Sequence[float],
    c: tuple[float, float] = (1.0, 1.0),
) -> Sides:  # fmt: skip
    """The gap R(r_i, eps) - R(r_j, eps) of hard over easy training examples, pair = (r_i, r_j), grows from eps[0] to eps[1].

    It does while eps < r_l g(r_i) for all modes r_l, where the normal density falls; for larger budgets, where everything is
    misclassified anyway, the gap shrinks again, which the thesis does not say.
    """
    gaps = [robust_error(pair[0], e, modes, shares, c) - robust_error(pair[1], e, modes, shares, c) for e in eps]
    return _sides([gaps[0]], [gaps[1]])


def ratio_5_27(norms: ArrayLike, beta: float = 0.5) -> Sides:
    """Second terms of the bounds of ATAS and ATTA, (1 - beta)^(1/4) mean(G) / sqrt(mean(G^2)), against (1 - beta)^(1/4):
    the more the examples' gradient norms G differ, the smaller."""
    g = _floats(norms)
    if not g.size or (g < 0).any() or not (g > 0).any():
        raise ValueError("norms: got none above 0 or a negative one, expected gradient norms")
    most = (1 - beta) ** 0.25
    return _sides([most * float(g.mean()) / math.sqrt(float((g**2).mean()))], [most])


def _sides(left: ArrayLike, right: ArrayLike) -> Sides:
    a, b = _floats(left), _floats(right)
    return Sides(a, b, float((b - a).min()))


def _dual(p: float) -> float:
    if p not in _DUAL:
        raise ValueError(f"p: got {p}, expected 1, 2 or inf")
    return _DUAL[p]


def _sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0, -z))


def _tail(z: float) -> float:
    """P(Z > z) of a standard normal Z."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def _floats(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


__all__ = [
    "Sides", "adversarial_logistic", "corollary_4_2", "lemma_4_2", "lemma_4_3", "max_margin", "proposition_4_2",
    "ratio_5_27", "robust_error", "theorem_4_1", "theorem_4_2", "theorem_4_4",
]  # fmt: skip
