"""Independent answers to problem (3.14): exact rationals, high precision, and float64 on many coordinates.

None of this shares an idea with the library's solver beyond the statement of the problem: the breakpoints are
sorted and scanned, where the library fixes coordinates without sorting.
"""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np


def rational(value) -> Fraction:
    return value if isinstance(value, Fraction) else Fraction(float(value))


def sides(a, lower, upper):
    """Coefficient sizes and the room on the side towards which each coordinate moves, as exact rationals."""
    pairs = []
    for x, lo, hi in zip(a, lower, upper, strict=False):
        room = -lo if x > 0 else hi
        if x != 0 and room > 0:
            pairs.append((abs(rational(x)), None if math.isinf(room) else rational(room)))
    return pairs


def _power_root(values, p, digits=60):
    """(sum values)^(1/p) with 60 digits."""
    with mpmath.workdps(digits):
        return mpmath.power(mpmath.fsum(values), mpmath.mpf(1) / mpmath.mpf(p))


def exact(a, b, lower, upper, p):
    """Distance as a Fraction (p = 1, inf), an mpmath number (other p) or math.inf; b > 0 assumed otherwise 0."""
    b = rational(b)
    if b <= 0:
        return Fraction(0)
    pairs = sides(a, lower, upper)
    if all(c is not None for _, c in pairs) and sum((w * c for w, c in pairs), Fraction(0)) < b:
        return math.inf
    if p == 1:
        cost, rest = Fraction(0), b
        for w, c in sorted(pairs, key=lambda pair: -pair[0]):
            if c is None or w * c >= rest:
                return cost + rest / w
            cost, rest = cost + c, rest - w * c
        return cost
    if p == math.inf or p == 2:
        # breakpoints of t: c for inf, c / w for 2
        rate = (lambda w: Fraction(1)) if p == math.inf else (lambda w: w)
        order = sorted(pairs, key=lambda pair: math.inf if pair[1] is None else pair[1] / rate(pair[0]))
        slope = sum((w * rate(w) for w, _ in order), Fraction(0))
        rest, squares, k = b, Fraction(0), 0
        while k < len(order):
            w, c = order[k]
            t = rest / slope
            if c is None or t <= c / rate(w):
                break
            rest, squares, slope, k = rest - w * c, squares + c * c, slope - w * rate(w), k + 1
        if p == math.inf:
            return rest / slope if k < len(order) else max(c for _, c in order)
        if k < len(order):
            squares += (rest / slope) ** 2 * slope
        with mpmath.workdps(60):
            return mpmath.sqrt(mpmath.mpf(squares.numerator) / mpmath.mpf(squares.denominator))
    return _general(pairs, b, p)


def _general(pairs, b, p, digits=60):
    """Bisection in 60 digits on the multiplier of min(t w^(1/(p-1)), c)."""
    with mpmath.workdps(digits):
        number = lambda q: mpmath.mpf(q.numerator) / mpmath.mpf(q.denominator)  # noqa: E731
        w = [number(x) for x, _ in pairs]
        c = [mpmath.inf if y is None else number(y) for _, y in pairs]
        top = max(w)
        v = [mpmath.power(x / top, 1 / (mpmath.mpf(p) - 1)) for x in w]
        target = number(b)
        step = lambda t: [min(t * x, y) for x, y in zip(v, c, strict=False)]  # noqa: E731
        gain = lambda t: mpmath.fsum(x * d for x, d in zip(w, step(t), strict=False))  # noqa: E731
        high = mpmath.mpf(1)
        while gain(high) < target:
            high *= 4
            if high > mpmath.mpf(10) ** 5000:
                break
        low = mpmath.mpf(0)
        for _ in range(220):
            middle = (low + high) / 2
            if gain(middle) < target:
                low = middle
            else:
                high = middle
        return _power_root([mpmath.power(d, p) for d in step(high)], p)


def exact_signed(a, b, lower, upper, p):
    """The signed distance: minus the distance to the other side when b < 0."""
    if b >= 0:
        return exact(a, b, lower, upper, p)
    return -exact([-x for x in a], -b, lower, upper, p)


def sorted_float64(a, b, lower, upper, p):
    """Rows (R, M) at once, p in {1, 2, inf}: sort the breakpoints, accumulate, find the piece. Long double sums."""
    a, b = np.asarray(a, np.longdouble), np.asarray(b, np.longdouble)
    lower, upper = np.broadcast_to(lower, a.shape), np.broadcast_to(upper, a.shape)
    w, c = np.abs(a), np.where(a > 0, -lower, upper).astype(np.longdouble)
    c = np.where(w > 0, c, 0)
    out = np.full(b.shape, math.inf, np.longdouble)
    for i in range(a.shape[0]):
        if b[i] <= 0:
            out[i] = 0
            continue
        use = w[i] > 0
        wi, ci = w[i][use], c[i][use]
        if (wi * ci).sum() < b[i]:
            continue
        if p == 1:
            order = np.argsort(-wi, kind="stable")
            wi, ci = wi[order], ci[order]
            before = np.concatenate([[0], np.cumsum(wi * ci)])
            k = int(np.searchsorted(before, b[i])) - 1
            out[i] = ci[:k].sum() + (b[i] - before[k]) / wi[k]
            continue
        v = np.ones_like(wi) if p == math.inf else wi
        order = np.argsort(ci / v, kind="stable")
        wi, ci, v = wi[order], ci[order], v[order]
        used = np.concatenate([[0], np.cumsum(wi * ci)])
        slope = np.cumsum((wi * v)[::-1])[::-1]
        for k in range(len(wi)):
            t = (b[i] - used[k]) / slope[k]
            if t <= ci[k] / v[k]:
                break
        out[i] = t if p == math.inf else np.sqrt((ci[:k] ** 2).sum() + t * t * (v[k:] ** 2).sum())
    return out


def bisected_float64(a, b, lower, upper, p):
    """Rows (R, M) at once, any p > 1: bisection of the common step in long double, for rows whose powers do not
    overflow."""
    a, b = np.asarray(a, np.longdouble), np.asarray(b, np.longdouble)
    w, c = np.abs(a), np.where(a > 0, -lower, upper).astype(np.longdouble)
    v = w ** (1 / (np.longdouble(p) - 1))
    out = np.full(b.shape, math.inf, np.longdouble)
    for i in range(a.shape[0]):
        if (w[i] * c[i]).sum() < b[i]:
            continue
        low, high = np.longdouble(0), np.longdouble(1)
        while (w[i] * np.minimum(high * v[i], c[i])).sum() < b[i]:
            high *= 4
        for _ in range(140):
            middle = (low + high) / 2
            if (w[i] * np.minimum(middle * v[i], c[i])).sum() < b[i]:
                low = middle
            else:
                high = middle
        out[i] = (np.minimum(high * v[i], c[i]) ** np.longdouble(p)).sum() ** (1 / np.longdouble(p))
    return out


NORMS = (1, 1.5, 2, 3, math.inf)


def close_and_never_above(got, want, relative: float = 1e-6) -> None:
    """Each distance of the tensor ``got`` is at most its exact value, within ``relative`` of it, and infinite with
    it."""
    values = got.double().flatten().tolist()
    assert len(values) == len(want)
    for value, truth in zip(values, want, strict=True):
        if math.isinf(truth):
            assert value == truth
        else:
            assert not value > truth, (value, truth)
            assert abs(value - float(truth)) <= relative * max(abs(float(truth)), 1e-38), (value, float(truth))
