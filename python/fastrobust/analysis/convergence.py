"""Bounds on training against an adversary, beside runs on a game where every constant is known: theorems 5.3 and 5.4 of
the thesis (ATAS and ATTA), theorem 1 of Wang et al. 2019.

The game, convex in the parameters and concave in each example's perturbation, |Delta_ij| <= D:

    L_i(theta, Delta_i) = a/2 ||theta - c||^2 + s_i <Delta_i, B theta + u> - k/2 ||Delta_i||^2,   L = mean_i L_i

Everything is numpy in float64.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .theory import Sides

Array = NDArray[Any]


class Game(NamedTuple):
    """``scales`` s (N,) >= 0, ``cross`` B (M, K), ``centre`` c (K,), ``drift`` u (M,), ``budget`` D > 0, ``convex`` a
    > 0, ``concave`` k >= 0."""

    scales: Array
    cross: Array
    centre: Array
    drift: Array
    budget: float
    convex: float = 1.0
    concave: float = 1.0

    def values(self, theta: Array, delta: Array) -> Array:
        """L_i, (N,). theta (K,), delta (N, M)."""
        pull = self.scales * (delta @ (self.cross @ theta + self.drift))
        bowl = self.convex / 2 * float(((theta - self.centre) ** 2).sum())
        return bowl + pull - self.concave / 2 * (delta**2).sum(axis=1)

    def in_theta(self, theta: Array, delta: Array) -> Array:
        """Gradients of each L_i in theta, (N, K)."""
        return self.convex * (theta - self.centre) + self.scales[:, None] * (delta @ self.cross)

    def in_delta(self, theta: Array, delta: Array) -> Array:
        """Gradients of each L_i in its own Delta_i, (N, M)."""
        return self.scales[:, None] * (self.cross @ theta + self.drift) - self.concave * delta

    def worst(self, theta: Array) -> Array:
        """The best perturbations, (N, M), in closed form."""
        pull = self.scales[:, None] * (self.cross @ theta + self.drift)
        if self.concave > 0:
            return np.clip(pull / self.concave, -self.budget, self.budget)
        return self.budget * np.sign(pull)

    def best(self, delta: Array) -> Array:
        """The parameters that minimise L at given perturbations, (K,)."""
        return self.centre - (self.scales[:, None] * (delta @ self.cross)).mean(axis=0) / self.convex


def game(
    examples: int = 20, inputs: int = 3, parameters: int = 4, *, budget: float = 0.5, concave: float = 1.0,
    tail: float = 1.0, seed: int = 0,
) -> Game:  # fmt: skip
    """A random game; the examples' gradient norms are log-normal with deviation ``tail``: long-tailed, as 5.2.3
    wants."""
    random = np.random.default_rng(seed)
    scales = np.exp(tail * random.standard_normal(examples))
    cross = random.standard_normal((inputs, parameters)) / math.sqrt(inputs * parameters)
    return Game(
        scales / scales.mean(), cross, random.standard_normal(parameters) / math.sqrt(parameters),
        random.standard_normal(inputs) / math.sqrt(inputs), budget, 1.0, concave,
    )  # fmt: skip


class Constants(NamedTuple):
    """Of Assumption 5.1 over everything that a run can reach: ``theta_distance`` D_theta, ``theta_gradient`` G_theta,
    ``gradients`` G_xi (N,) of each example, ``smooth`` L_x, ``mixed`` (N,): Lipschitz constants of grad_theta L_i in
    Delta."""

    theta_distance: float
    theta_gradient: float
    gradients: Array
    smooth: float
    mixed: Array


def constants(game: Game) -> Constants:
    """Constants of a run from theta = 0 and Delta = 0 whose step in theta is at most 1 / a."""
    norm, root = float(np.linalg.norm(game.cross, 2)), math.sqrt(len(game.drift))
    push, centre = norm * root * game.budget, float(np.linalg.norm(game.centre))
    radius = max(centre, float(game.scales.max()) * push / game.convex)  # of theta around c
    distance = centre + float(game.scales.mean()) * push / game.convex
    theta = game.convex * radius + math.sqrt(float((game.scales**2).mean())) * push
    gradient = game.scales * (norm * (radius + centre) + float(np.linalg.norm(game.drift)))
    return Constants(
        distance, theta, gradient + game.concave * root * game.budget, game.concave, game.scales * norm
    )  # fmt: skip


class Regret(NamedTuple):
    """``printed``: the regret and the thesis' bound of it. ``derived``: the regret and a bound that holds for the
    updates as printed (for one row a step it is larger). ``each_step``: the regret as (5.20) defines it, with an
    adversary that answers every step anew; the proofs bound the smaller one with fixed answers, which is enough for
    Lemma 5.1."""

    printed: Sides
    derived: Sides
    each_step: float


def theorem_5_4(game: Game, *, steps: int = 2000, rows: str = "one", runs: int = 8, seed: int = 0) -> Regret:
    """Regret of SGDBCA (ATTA, update 5.25) after T = ``steps`` against (5.26), G_th D_th sqrt(T) + G_x D sqrt(M T /
    N) + M L_x D^2 / (2 N), with the step sizes of the theorem (eta_x = sqrt(N M) D / (G_x sqrt(T)); printed is the
    root of D).

    The regret is the mean over ``runs`` draws of the sampled rows, against the worst fixed theta and Delta.

    rows "one": only the sampled row of Delta moves, as (5.25) says. The proof takes the mean over the sampled row as if
    all had moved ((5.32), (5.33): a factor 1/N too much), so that (5.26) can fail. What follows instead is

        D_th^2 / (2 eta_th) + T eta_th G_th^2 / 2 + N M D^2 / (2 eta_x) + T eta_x G_x^2 / (2 N)
            + T D_th eta_x mean_i(L_theta_x,i G_xi),

    ``derived``. rows "all": every row moves at every step, theta by a sampled row: (5.26) holds, and is ``derived``.
    """
    known = constants(game)
    n, m = len(game.scales), len(game.drift)
    total = math.sqrt(float((known.gradients**2).sum()))
    eta = math.sqrt(n * m) * game.budget / (total * math.sqrt(steps))
    second = total * game.budget * math.sqrt(m * steps / n)
    third = m * known.smooth * game.budget**2 / (2 * n)
    regret, each = _play(game, known, eta, None, steps, rows, runs, seed)
    first = known.theta_gradient * known.theta_distance * math.sqrt(steps)
    printed, derived = first + second + third, first + second + third
    if rows == "one":
        mixed = steps * known.theta_distance * eta * float((known.mixed * known.gradients).mean())
        derived = first + n * m * game.budget**2 / (2 * eta) + steps * eta * total**2 / (2 * n) + mixed
    return Regret(_one(regret, printed), _one(regret, derived), each)


def theorem_5_3(
    game: Game, *, steps: int = 2000, beta: float = 0.5, rows: str = "one", runs: int = 8, seed: int = 0
) -> Regret:
    """Regret of ASGDBCA (ATAS with a preconditioner that never falls, (5.23)) after T = ``steps`` against (5.24),
    G_th D_th sqrt(T) + D sum(G_xi) sqrt(M T) / (N (1 - beta)^(1/4)) + M L_x D^2 / (2 N^2 sqrt(1 - beta)).

    As in :func:`theorem_5_4`, the proof counts a step of one row as if all rows moved; it also takes |Delta - Delta*|
    <= D where both lie in a box of half width D, so that 2 D is right (D is for the start at 0). ``derived`` has
    both, and for rows "one" the factor N and the mixed term; for rows "all" only the factor 4 and the third term of
    (5.56).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta: got {beta}, expected at least 0 and below 1")
    known = constants(game)
    n, m = len(game.scales), len(game.drift)
    total, root = float(known.gradients.sum()), (1 - beta) ** 0.5
    eta = math.sqrt(m) * game.budget * math.sqrt(root) / math.sqrt(steps)
    regret, each = _play(game, known, eta, beta, steps, rows, runs, seed)
    first = known.theta_gradient * known.theta_distance * math.sqrt(steps)
    printed = first + game.budget * total * math.sqrt(m * steps) / (n * math.sqrt(root))
    printed += m * known.smooth * game.budget**2 / (2 * n**2 * root)
    moved = m * (2 * game.budget) ** 2 * total / (2 * eta) * (1 if rows == "one" else 1 / n)
    derived = first + moved + steps * eta * total / (2 * n * root)
    if rows == "one":  # ||step|| <= eta ||g|| / sqrt(v) <= eta / (1 - beta)^(1/2)
        derived += steps * known.theta_distance * eta / root * float(known.mixed.mean())
    else:
        derived += steps * known.smooth * eta**2 / (2 * root**2)
    return Regret(_one(regret, printed), _one(regret, derived), each)


def _one(left: float, right: float) -> Sides:
    return Sides(np.array([left]), np.array([right]), right - left)


def _play(
    game: Game, known: Constants, eta: float, beta: float | None, steps: int, rows: str, runs: int, seed: int
) -> tuple[float, float]:
    """Mean regret over the runs, against fixed answers and against answers of every step."""
    if rows not in ("one", "all"):
        raise ValueError(f"rows: got {rows!r}, expected 'one' or 'all'")
    if steps < 4 or runs < 1:
        raise ValueError(f"steps, runs: got {steps}, {runs}, expected at least 4, and 1")
    n, random = len(game.scales), np.random.default_rng(seed)
    rate = known.theta_distance / (known.theta_gradient * math.sqrt(steps))
    thetas, deltas, squares, bowls, each = np.zeros(len(game.centre)), np.zeros((n, len(game.drift))), 0.0, 0.0, 0.0
    for _ in range(runs):
        theta, delta, v, top = np.zeros(len(game.centre)), np.zeros_like(deltas), np.zeros(n), np.zeros(n)
        for _ in range(steps):
            k = int(random.integers(n))
            moving = slice(None) if rows == "all" else slice(k, k + 1)
            before = (
                delta.copy() if rows == "one" else delta
            )  # the derivation for one row compares with Delta(t), (5.20)
            grad = game.in_delta(theta, delta)[moving]
            size = np.full(len(grad), eta)
            if beta is not None:
                v[moving] = beta * v[moving] + (1 - beta) * (grad**2).sum(axis=1)
                top[moving] = np.maximum(top[moving], v[moving])
                size = eta / np.sqrt(np.maximum(top[moving], 1e-300))
            delta[moving] = np.clip(delta[moving] + size[:, None] * grad, -game.budget, game.budget)
            thetas += theta
            deltas += before
            bowls += game.convex / 2 * float(((theta - game.centre) ** 2).sum())
            squares += game.concave / 2 * float((before**2).sum()) / n
            there = game.best(before)
            each += float(game.values(theta, game.worst(theta)).mean() - game.values(there, before).mean())
            theta = theta - rate * game.in_theta(theta, delta)[k]
    count = runs * steps
    mean_theta, mean_delta = thetas / count, deltas / count
    # L is affine in theta beside the bowl, and in Delta beside the squares: the means and these two sums are enough
    answer, reply = game.worst(mean_theta), game.best(mean_delta)
    high = float(game.values(mean_theta, answer).mean()) - game.convex / 2 * float(
        ((mean_theta - game.centre) ** 2).sum()
    )
    low = float(game.values(reply, mean_delta).mean()) + game.concave / 2 * float((mean_delta**2).sum()) / n
    return steps * (high + bowls / count - low + squares / count), each / runs


def theorem_1_wang(
    game: Game, delta: float, *, steps: int = 1000, batch: int = 1, seed: int = 0
) -> tuple[dict[str, float], Sides]:
    """Wang et al., theorem 1: mean ||grad L_S(theta_t)||^2 <= 4 sigma sqrt(L gap / T) + 5 L_tx^2 delta / mu.

    L_S(theta) = mean_i max L_i; each inner problem is solved by projected ascent up to a first-order stationary
    condition (equation 4) of at most ``delta``, and theta goes along the gradient there of ``batch`` sampled examples
    with the step min(1 / L, sqrt(gap / (L sigma^2 T))). Answers the quantities L = L_tx L_xt / mu + L_tt, mu, L_tx,
    gap = L_S(theta_0) - min L_S, sigma (the largest deviation of the exact stochastic gradient on the way), the
    largest ``fosc`` left, and the two sides. Its proof needs T >= L gap / sigma^2, where the second step size is the
    smaller one, which is not printed: without noise the first term is 0, and the bound would hold from the first step
    on.

    Raises:
        ValueError: a game that is not strongly concave.
    """
    if not game.concave > 0 or delta < 0 or not 1 <= batch <= len(game.scales):
        raise ValueError(
            f"game, delta, batch: got concave {game.concave}, {delta}, {batch}, expected > 0, >= 0, 1 to N"
        )
    random, mixed = np.random.default_rng(seed), float(constants(game).mixed.max())
    smooth = mixed**2 / game.concave + game.convex
    outer = lambda theta: game.in_theta(theta, game.worst(theta))
    value = lambda theta: float(game.values(theta, game.worst(theta)).mean())
    start = np.zeros(len(game.centre))
    goal = start
    for _ in range(20_000):
        step = outer(goal).mean(axis=0) / smooth
        goal = goal - step
        if np.abs(step).max() < 1e-14:
            break
    gap = value(start) - value(goal)
    # the step size wants the deviation before the way is known: that of a run of full gradients from the same start
    sigma = _deviation(game, start, smooth, batch)
    rate = min(1 / smooth, math.sqrt(gap / (smooth * sigma**2 * steps))) if sigma else 1 / smooth
    theta, total, left = start, 0.0, 0.0
    for _ in range(steps):
        exact = outer(theta)
        total += float((exact.mean(axis=0) ** 2).sum())
        sigma = max(sigma, _spread(exact, batch))
        found = np.zeros((len(game.scales), len(game.drift)))
        while True:
            grad = game.in_delta(theta, found)
            fosc = game.budget * np.abs(grad).sum(axis=1) - (found * grad).sum(axis=1)
            if fosc.max() <= max(delta, 1e-12):
                break
            ahead = np.clip(found + 0.5 / game.concave * grad, -game.budget, game.budget)
            found = np.where((fosc > delta)[:, None], ahead, found)
        left = max(left, float(fosc.max()))
        rows = random.choice(len(found), batch, replace=False)
        theta = theta - rate * game.in_theta(theta, found)[rows].mean(axis=0)
    bound = 4 * sigma * math.sqrt(smooth * gap / steps) + 5 * mixed**2 * delta / game.concave
    quantities = {"L": smooth, "mu": game.concave, "L_tx": mixed, "gap": gap, "sigma": sigma, "fosc": left}
    return quantities, _one(total / steps, bound)


def _spread(each: Array, batch: int) -> float:
    n = len(each)
    variance = float(((each - each.mean(axis=0)) ** 2).sum(axis=1).mean()) / batch
    return math.sqrt(variance * (n - batch) / max(n - 1, 1))


def _deviation(game: Game, theta: Array, smooth: float, batch: int) -> float:
    found = 0.0
    for _ in range(200):
        each = game.in_theta(theta, game.worst(theta))
        found = max(found, _spread(each, batch))
        theta = theta - each.mean(axis=0) / smooth
    return found


__all__ = ["Constants", "Game", "Regret", "constants", "game", "theorem_1_wang", "theorem_5_3", "theorem_5_4"]
