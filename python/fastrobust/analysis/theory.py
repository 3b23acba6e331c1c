"""Statements of the thesis that can be checked with numbers (chapters 3 to 5): the two sides and the margin.

Rows of ``x`` are examples; binary labels ``y`` are -1 or +1. Everything is numpy in float64. Theorems 5.1 and 5.2 are
in :mod:`fastrobust.analysis.subnetwork`, 5.3 and 5.4 in :mod:`fastrobust.analysis.convergence`.
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


def theorem_3_1(
    a: ArrayLike, b: float, lower: ArrayLike, upper: ArrayLike, *, p: float = math.inf
) -> tuple[Array, int, Sides]:
    """Algorithm 3.4 as printed finds the shortest Delta with <a, Delta> + b <= 0 inside lower <= Delta <= upper (3.14).

    a, lower, upper: (M,); b: the value of the affine function at Delta = 0; p > 1 or inf. Answers Delta (M,), how many
    iterations the greedy algorithm took, and ||Delta||_p <= the value of the dual (3.18) at its best multiplier,
    which no
    feasible vector goes below: both are then the optimum. (:func:`fastrobust.ops.polyhedral_distance` is the fast one.)

    Raises:
        ValueError: p of at most 1, a box without 0, or one that does not reach the hyperplane (Slater's condition).
    """
    a, lower, upper = np.broadcast_arrays(_floats(a), _floats(lower), _floats(upper))
    if not p > 1:
        raise ValueError(f"p: got {p}, expected more than 1, or inf")
    if not ((lower <= 0) & (upper >= 0)).all():
        raise ValueError("lower, upper: got a box without 0, expected lower <= 0 <= upper")
    if b > 0 and b + float(np.minimum(a * lower, a * upper).sum()) > 0:
        raise ValueError("upper: got a box that does not reach the hyperplane, expected one that does")
    power = 0.0 if p == math.inf else 1 / (p - 1)  # q / p of the dual norm q
    delta, fixed, iterations = np.zeros(len(a)), np.zeros(len(a), dtype=bool), 0
    while b > 0:
        # (3.15) for what is left, given the entries that are fixed at the box
        rest = b + float(a[fixed] @ delta[fixed])
        shape = np.sign(a) * np.abs(a) ** power
        free = float((a * shape)[~fixed].sum())
        if free > 0:
            delta = np.where(fixed, delta, -rest / free * shape)
        out = ~fixed & ((delta < lower) | (delta > upper))
        if not out.any():
            break
        delta, fixed, iterations = np.clip(delta, lower, upper), fixed | out, iterations + 1
    reached = float(np.linalg.norm(delta, p)) if delta.size else 0.0
    return delta, iterations, _sides([reached], [_dual_value(a, b, lower, upper, p)])


def _dual_value(a: Array, b: float, lower: Array, upper: Array, p: float) -> float:
    """The best lower bound of problem (3.14) by bisection over the multiplier (p = inf: over the length itself)."""
    if b <= 0:
        return 0.0

    def point(s: float) -> Array:
        size = s * np.ones(len(a)) if p == math.inf else np.abs(s * a / p) ** (1 / (p - 1))
        return np.clip(-np.sign(a) * size, lower, upper)  # (3.19)

    low, high = 0.0, 1.0
    while a @ point(high) + b > 0 and high < 1e300:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if a @ point(middle) + b > 0 else (low, middle)
    if p == math.inf:
        return low
    best = max(float((np.abs(point(s)) ** p).sum() + s * (a @ point(s) + b)) for s in (low, high))
    return max(best, 0.0) ** (1 / p)


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
    """From the budget eps_bar of the proof on, a linear model is no better than a constant one: log K <= loss at x +
    Delta.

    weights: (K, M); x: (M,). Answers eps_bar = (log(K - 1) - <w_m - w_y, x>) / ||w_m - w_y||_q and the sides there,
    with Delta of length eps_bar along w_m - w_y, where w_m is the row farthest from w_y.
    eps_bar grows without bound as the weights shrink, so it is none for every W, which the theorem asks for; eps =
    ||x||_p is (Delta = -x gives equal logits).
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


def theorem_4_3(
    x: ArrayLike, y: ArrayLike, eps: float, *, steps: int = 2000, gammas: Sequence[float] = (3.0, 4.0, 6.0),
    w: ArrayLike | None = None, batch: int | None = None, seed: int = 0,
) -> tuple[Sides, Sides]:  # fmt: skip
    """Large gradients are rare on the way of SGD on the adversarial logistic loss: (4.17), and (4.22) behind it.

    SGD from ``w`` (0 by default) with step 1 / (L_tt sqrt(T)) for T = ``steps`` on ``batch`` examples a step (None:
    all). The first pair has, for each gamma, the share of steps with ||grad L|| > gamma eps L_tx, and 4 / (gamma -
    2)^2, at most 1. That is what (4.24) yields; the printed 4 / (gamma^2 - 2 gamma + 4) is smaller and does not
    follow. The second pair is (4.22),

        mean(||grad||^2 / 2 - 2 eps L_tx ||grad||) <= (L_tt (L(w_0) - L*) + sigma^2 / 2) / sqrt(T) [+ 2 eps L_tx sigma],

    with L* >= 0 taken as 0 and sigma^2 the largest variance on the way. The last term stands for E||g|| ~ ||grad||,
    which the
    proof assumes: it is 0 for batch=None, where nothing is random. Constants as in :func:`proposition_4_2`, over the
    path.
    """
    x, y = _floats(x), _floats(y)
    if steps < 1 or min(gammas, default=3.0) <= 2 or not 1 <= (len(x) if batch is None else batch) <= len(x):
        raise ValueError(f"steps, gammas, batch: got {steps}, {gammas}, {batch}, expected >= 1, > 2, 1 to {len(x)}")
    random = np.random.default_rng(seed)
    at = np.zeros(x.shape[1]) if w is None else _floats(w).copy()
    reach = float(np.linalg.norm(x, axis=1).max()) + eps
    size = 4 / reach**2 / math.sqrt(steps)
    first, norms, lengths, variance = adversarial_logistic(at, x, y, eps)[0], [], [0.0], 0.0
    for _ in range(steps):
        rows = random.choice(len(x), batch, replace=False) if batch else slice(None)
        full = adversarial_logistic(at, x, y, eps)[1]
        if batch:
            each = np.stack([adversarial_logistic(at, x[i : i + 1], y[i : i + 1], eps)[1] for i in range(len(x))])
            spread = ((each - full) ** 2).sum(axis=1).mean() / batch
            variance = max(variance, float(spread * (len(x) - batch) / max(len(x) - 1, 1)))
        norms.append(float(np.linalg.norm(full)))
        at = at - size * adversarial_logistic(at, x[rows], y[rows], eps)[1]
        lengths.append(float(np.linalg.norm(at)))
    cross, found = 1 + max(lengths) * reach / 4, np.array(norms)
    shares = [float((found > g * eps * cross).mean()) for g in gammas]
    rare = _sides(shares, [min(1.0, 4 / (g - 2) ** 2) for g in gammas])
    limit = (reach**2 / 4 * first + variance / 2) / math.sqrt(steps) + 2 * eps * cross * math.sqrt(variance)
    return rare, _sides([float((found**2 / 2 - 2 * eps * cross * found).mean())], [limit])


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
    """The max-margin vector under an l2 budget (4.35), w' = w / (1 - eps ||w||), collinear with that without one, and
    its
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
    """The gap R(r_i, eps) - R(r_j, eps) of hard over easy training examples, pair = (r_i, r_j), grows from eps[0] to
    eps[1].

    It does while eps < r_l g(r_i) for all modes r_l, where the normal density falls; for larger budgets, where
    everything is misclassified anyway, the gap shrinks again, which the thesis does not say.
    """
    gaps = [robust_error(pair[0], e, modes, shares, c) - robust_error(pair[1], e, modes, shares, c) for e in eps]
    return _sides([gaps[0]], [gaps[1]])


def lipschitz_4_56(
    gamma: float, *, examples: int, inputs: int, parameters: int, diameter: float, smoothness: float, c: float = 1.0,
    delta: float = 0.5,
) -> float:  # fmt: skip
    """(4.56): with probability 1 - delta, a model that fits its training set has at least this Lipschitz constant.

    gamma = sigma_l^2 + h^2(C, eps) - C; N = ``examples``, M = ``inputs``, b = ``parameters``, W = ``diameter`` of the
    set of parameters, J = ``smoothness``: ||f(t1, .) - f(t2, .)||_inf <= J ||t1 - t2||_inf; c of isoperimetry. 0
    where the statement
    is empty: gamma = 0, 4 W J <= gamma, or delta <= 4 exp(-2^-11 N gamma^2), which needs thousands of examples (the
    proof prints 2^11 there).
    """
    if gamma < 0 or not 0 < delta < 1:
        raise ValueError(f"gamma, delta: got {gamma}, {delta}, expected at least 0, and between 0 and 1")
    rest = delta / 2 - 2 * math.exp(-(2.0**-11) * examples * gamma**2)
    if gamma == 0 or rest <= 0 or 4 * diameter * smoothness <= gamma:
        return 0.0
    below = c * (parameters * math.log(4 * diameter * smoothness / gamma) - math.log(rest))
    return gamma / 2**7 * math.sqrt(examples * inputs / below)


def theorem_4_6(
    examples: int = 4500, inputs: int = 9000, eps: float = 0.0, *, delta: float = 0.5, seed: int = 0
) -> Sides:
    """(4.56) <= Lip(f) for the linear model clip(<theta, x>, -1, 1) that interpolates labels of pure noise.

    x uniform on the unit sphere of R^M (isoperimetric with c = M / (M - 1)), y = +-1 by a coin: sigma_l = 1. theta is
    the shortest that fits all labels, by conjugate gradients in float32 (two passes over the N x M inputs an
    iteration); Lip = ||theta||_2 = W / 2, J = sqrt(M), and an l2 budget leaves C = min(eps ||theta||, 2)^2. h(C, eps)
    >= 0 is taken as 0, which makes the bound smaller.
    """
    if not 1 < examples < inputs:
        raise ValueError(f"examples: got {examples} for {inputs} inputs, expected fewer than inputs, and more than 1")
    random = np.random.default_rng(seed)
    x = random.standard_normal((examples, inputs), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.where(random.random(examples) < 0.5, -1.0, 1.0).astype(np.float32)
    a, rest = np.zeros_like(y), y.copy()
    along, left = rest.copy(), float(rest @ rest)
    for _ in range(200):
        image = x @ (x.T @ along)
        size = left / float(along @ image)
        a, rest = a + size * along, rest - size * image
        new = float(rest @ rest)
        if new < 1e-9 * examples:
            break
        along, left = rest + new / left * along, new
    theta = (x.T @ a).astype(np.float64)
    length = float(np.linalg.norm(theta))
    missed = float(((x @ theta.astype(np.float32) - y).astype(np.float64) ** 2).mean())
    gamma = max(1 - (min(eps * length, 2.0) + math.sqrt(missed)) ** 2, 0.0)
    bound = lipschitz_4_56(
        gamma, examples=examples, inputs=inputs, parameters=inputs, diameter=2 * length, smoothness=math.sqrt(inputs),
        c=inputs / (inputs - 1), delta=delta,
    )  # fmt: skip
    return _sides([bound], [length])


def ratio_5_27(norms: ArrayLike, beta: float = 0.5) -> Sides:
    """Second terms of the bounds of ATAS and ATTA, (1 - beta)^(1/4) mean(G) / sqrt(mean(G^2)), against (1 -
    beta)^(1/4): the more the examples' gradient norms G differ, the smaller.

    As printed; the terms of (5.24) and (5.26) have the inverse of that factor as their ratio.
    """
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
    "Sides", "adversarial_logistic", "corollary_4_2", "lemma_4_2", "lemma_4_3", "lipschitz_4_56", "max_margin",
    "proposition_4_2", "ratio_5_27", "robust_error", "theorem_3_1", "theorem_4_1", "theorem_4_2", "theorem_4_3",
    "theorem_4_4", "theorem_4_6",
]  # fmt: skip
