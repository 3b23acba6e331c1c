"""Linear relaxations and intervals of activation functions, in plain torch.

For an activation s and an interval [l, u], ``relax`` returns lines that bound s from both sides on the interval:

    slopes[0] * x + intercepts[0] <= s(x) <= slopes[-1] * x + intercepts[1]        for l <= x <= u

``kind="parallel"``: both lines share one slope (thesis, equations 3.3 to 3.5 and table 3.1), so ``slopes`` has a
leading dimension of 1. ``kind="crown"``: adaptive lines in the manner of CROWN (Zhang et al. 2018), leading dimension
2: slope 0 or 1 below a ReLU, for convex and for S-shaped functions the lines that leave the least area (CROWN itself
takes the tangent through the far end of an interval around 0, wherever the tangent at the midpoint is tighter, too);
for SiLU, GELU (and ELU with alpha > 1), which are neither, the better of the chord's slope and the derivative at the
midpoint, side by side.

For ANY slope d the tightest valid intercepts are the minimum and maximum of s(x) - d x over the ends of the interval
and the points inside it where s'(t) = d or where s has a kink. Every formula here is an instance of that, which is why
they stay valid for degenerate intervals. Tangent points are detached: the derivative of s(t) - d t with respect to t is
zero there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ACTIVATIONS = (
    "relu",
    "leaky_relu",
    "hardtanh",
    "relu6",
    "sigmoid",
    "tanh",
    "arctan",
    "softplus",
    "elu",
    "silu",
    "gelu",
    "gelu_tanh",
)
_DEFAULTS: dict[str, tuple[float, ...]] = {
    "leaky_relu": (0.01,),
    "hardtanh": (-1.0, 1.0),
    "softplus": (1.0, 20.0),
    "elu": (1.0,),
}
_NARROW = 1e-2  # below this width the chord's slope is replaced by the derivative at the midpoint (cancellation)
_SQRT2, _INV_SQRT_2PI = math.sqrt(2.0), 1.0 / math.sqrt(2.0 * math.pi)
_TANH_C, _TANH_K = math.sqrt(2.0 / math.pi), 0.044715
# s'' = 0 and s' = 0 of the activations without closed tangent points: (inflection point, point of the minimum)
_VALLEY = {
    "silu": (2.3993572805154676, -1.2784645427610738),
    "gelu": (_SQRT2, -0.7517915246935645),
    "gelu_tanh": (1.4185040087908283, -0.7524614220710163),
}


def parameters_of(activation: str, params: tuple[float, ...] = ()) -> tuple[float, ...]:
    """The parameters of an activation with torch's defaults filled in."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    want = _DEFAULTS.get(activation, ())
    got = tuple(float(p) for p in params) if params else want
    if len(got) != len(want):
        raise ValueError(f"params: {activation} takes {len(want)} parameters, got {len(got)}")
    if not all(map(math.isfinite, got)) and activation != "hardtanh":
        raise ValueError(f"params: got {got} for {activation}, expected finite ones")
    if activation == "leaky_relu" and not 0.0 <= got[0] <= 1.0:
        raise ValueError(f"params: got a negative slope of {got[0]} for leaky_relu, expected one in [0, 1]")
    if activation == "elu" and not got[0] >= 0.0:
        raise ValueError(f"params: got an alpha of {got[0]} for elu, expected one >= 0")
    if activation == "hardtanh" and not -math.inf < got[0] < got[1] < math.inf:
        raise ValueError(f"params: got {got} for hardtanh, expected finite min < max")
    if activation == "softplus" and not (got[0] > 0.0 and got[1] >= 0.0):
        raise ValueError(
            f"params: got beta {got[0]} and threshold {got[1]} for softplus, expected beta > 0, threshold >= 0"
        )
    return got


def value(x: Tensor, activation: str, params: tuple[float, ...] = ()) -> Tensor:
    """s(x), as torch computes it."""
    params = parameters_of(activation, params)
    f = torch.nn.functional
    match activation:
        case "relu":
            return f.relu(x)
        case "leaky_relu":
            return f.leaky_relu(x, params[0])
        case "hardtanh":
            return f.hardtanh(x, params[0], params[1])
        case "relu6":
            return f.relu6(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "tanh":
            return torch.tanh(x)
        case "arctan":
            return torch.arctan(x)
        case "softplus":
            return f.softplus(x, params[0], params[1])
        case "elu":
            return f.elu(x, params[0])
        case "silu":
            return f.silu(x)
        case "gelu":
            return f.gelu(x)
        case _:
            return f.gelu(x, approximate="tanh")


def derivative(x: Tensor, activation: str, params: tuple[float, ...] = ()) -> Tensor:
    """s'(x), by differentiable formulas (a one-sided value at a kink)."""
    params = parameters_of(activation, params)
    match activation:
        case "relu":
            return (x > 0).to(x.dtype)
        case "leaky_relu":
            return torch.where(x > 0, torch.ones_like(x), params[0])
        case "hardtanh" | "relu6":
            lo, hi = params if activation == "hardtanh" else (0.0, 6.0)
            return ((x > lo) & (x < hi)).to(x.dtype)
        case "sigmoid":
            return torch.sigmoid(x) * torch.sigmoid(-x)
        case "tanh":
            return 4.0 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x)
        case "arctan":
            return 1.0 / (1.0 + x * x)
        case "softplus":
            y = params[0] * x
            return torch.where(y > params[1], torch.ones_like(x), torch.sigmoid(y))
        case "elu":
            return torch.where(x > 0, torch.ones_like(x), params[0] * torch.exp(x.clamp(max=0)))
        case "silu":
            g = torch.sigmoid(x)
            return g * (1 + x * torch.sigmoid(-x))
        case "gelu":
            return 0.5 * torch.erfc(-x / _SQRT2) + x * _INV_SQRT_2PI * torch.exp(-0.5 * x * x)
        case _:
            z = _TANH_C * (x + _TANH_K * x * x * x)
            dz = _TANH_C * (1 + 3 * _TANH_K * x * x)
            return torch.sigmoid(2 * z) + 2.0 * x * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z) * dz


def kinks(activation: str, params: tuple[float, ...] = ()) -> tuple[float, ...]:
    """The points where s' jumps."""
    params = parameters_of(activation, params)
    match activation:
        case "relu" | "leaky_relu" | "elu":
            return (0.0,)
        case "hardtanh":
            return params
        case "relu6":
            return (0.0, 6.0)
        case "softplus":
            return (params[1] / params[0],)  # torch switches to the identity there
        case _:
            return ()


def _solve_slope(d: Tensor, activation: str, low: float, high: float) -> Tensor:
    """t in [low, high] with s'(t) = d, where s' is monotone there; the nearer end when there is none."""
    a, b = torch.full_like(d, low), torch.full_like(d, high)
    rising = bool(derivative(b.new_tensor(high), activation) > derivative(b.new_tensor(low), activation))
    for _ in range(52 if d.dtype == torch.float64 else 32):
        m = 0.5 * (a + b)
        right = (derivative(m, activation) < d) == rising
        a, b = torch.where(right, m, a), torch.where(right, b, m)
    return 0.5 * (a + b)


def _critical(d: Tensor, activation: str, params: tuple[float, ...]) -> list[Tensor]:
    """Every smooth point t with s'(t) = d (any value where there is none)."""
    tiny = torch.finfo(d.dtype).tiny
    match activation:
        case "sigmoid":
            p = d.clamp(tiny, 0.25)
            t = 2 * torch.log1p((1 - 4 * p).sqrt()) - 2 * math.log(2.0) - p.log()
            return [-t, t]
        case "tanh":
            p = d.clamp(tiny, 1.0)
            t = torch.log1p((1 - p).sqrt()) - 0.5 * p.log()
            return [-t, t]
        case "arctan":
            p = d.clamp(tiny, 1.0)
            t = ((1 - p) / p).sqrt()
            return [-t, t]
        case "softplus":
            p = d.clamp(tiny, 1 - torch.finfo(d.dtype).eps)
            return [(p.log() - torch.log1p(-p)) / params[0]]
        case "elu":
            return [(d.clamp(min=tiny) / params[0]).log()] if params[0] > 0 else []
        case "silu" | "gelu" | "gelu_tanh":
            w = _VALLEY[activation][0]
            far = 120.0 if activation == "silu" else 16.0
            return [_solve_slope(d, activation, lo, hi) for lo, hi in ((-far, -w), (-w, w), (w, far))]
        case _:
            return []


def interval_activation(
    lower: Tensor, upper: Tensor, activation: str, params: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The range [min s, max s] of an activation over [lower, upper], elementwise (thesis, Algorithm 3.2)."""
    params = parameters_of(activation, params)
    sl, su = value(lower, activation, params), value(upper, activation, params)
    if activation == "softplus":  # torch's steps down to the identity where beta x passes the threshold
        knot = torch.full_like(lower, params[1] / params[0])
        near = 2.0**-22 * knot  # where a float32 product beta x may fall on the other side
        steps = (lower <= knot + near) & (knot - near <= upper)
        high = torch.log1p(torch.exp(params[0] * knot)) / params[0]
        return torch.where(steps, torch.minimum(sl, knot), sl), torch.where(steps, torch.maximum(su, high), su)
    if activation not in _VALLEY:
        return sl, su
    t = torch.full_like(lower, _VALLEY[activation][1])
    inside = (lower <= t) & (t <= upper)
    low = torch.minimum(sl, su)
    return torch.where(inside, value(t, activation), low), torch.maximum(sl, su)


class Lines(NamedTuple):
    slopes: Tensor  # (1 or 2, *shape)
    intercepts: Tensor  # (2, *shape)


def _candidates(
    d: Tensor, l: Tensor, u: Tensor, activation: str, params: tuple[float, ...]
) -> tuple[Tensor, list[Tensor]]:
    """s(x) - d x where it can be extreme on [l, u], (points, *shape), and these points; one outside counts as l."""
    sl, su = value(l, activation, params), value(u, activation, params)
    values = [sl - d * l, su - d * u]
    with torch.no_grad():
        points = [torch.full_like(d, k) for k in kinks(activation, params)] + _critical(d, activation, params)
        inside = [(l < t) & (t < u) for t in points]
    for t, m in zip(points, inside, strict=False):
        values.append(torch.where(m, value(t, activation, params) - d * t, values[0]))
    return torch.stack(values), [l, u, *(torch.where(m, t, l) for t, m in zip(points, inside, strict=True))]


@torch.no_grad()
def _padding(d: Tensor, l: Tensor, u: Tensor, activation: str, params: tuple[float, ...]) -> Tensor | float:
    """What s(x) - d x may be wrong by: a few ulp where s is not piecewise linear."""
    if activation in ("relu", "leaky_relu", "hardtanh", "relu6"):
        return 0.0
    sl, su = value(l, activation, params), value(u, activation, params)
    jump = math.exp(-params[1]) / params[0] if activation == "softplus" else 0.0  # torch's switch to the identity
    size = d.abs() * torch.maximum(l.abs(), u.abs()) + torch.maximum(sl.abs(), su.abs())
    return jump + 8 * torch.finfo(d.dtype).eps * size


def _intercepts(d: Tensor, l: Tensor, u: Tensor, activation: str, params: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """min and max of s(x) - d x over [l, u], padded by a few ulp where s is not piecewise linear."""
    values, _ = _candidates(d, l, u, activation, params)
    low, high = values.amin(0), values.amax(0)
    pad = _padding(d, l, u, activation, params)
    return (low, high) if isinstance(pad, float) else (low - pad, high + pad)


def support(
    d: Tensor, lower: Tensor, upper: Tensor, activation: str, params: tuple[float, ...] = (), above: bool = False
) -> tuple[Tensor, Tensor]:
    """The tightest intercept of a line with any slope d below (``above``) an activation on [lower, upper], and the
    point where the line touches: minus the intercept's derivative by d. Differentiable in d, lower and upper."""
    params = parameters_of(activation, params)
    values, points = _candidates(d, lower, upper, activation, params)
    extreme, which = values.max(0, keepdim=True) if above else values.min(0, keepdim=True)
    pad = _padding(d, lower, upper, activation, params)
    point = torch.stack(points).gather(0, which)[0].detach()
    return extreme[0] + (pad if above else -pad), point


def derivative_range(
    lower: Tensor, upper: Tensor, activation: str, params: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The least and the largest derivative of an activation on [lower, upper]: beyond them no line of it is the
    best."""
    params = parameters_of(activation, params)
    if activation in ("relu", "leaky_relu", "hardtanh", "relu6", "elu"):
        least = params[0] if activation == "leaky_relu" else 0.0
        most = max(1.0, params[0]) if activation == "elu" else 1.0
        return torch.full_like(lower, least), torch.full_like(upper, most)
    bend = _VALLEY[activation][0] if activation in _VALLEY else 0.0
    bends = [] if activation == "softplus" else sorted({-bend, bend})
    found = [derivative(lower, activation, params), derivative(upper, activation, params)]
    for place in bends:
        t = torch.full_like(lower, place)
        found.append(torch.where((lower < t) & (t < upper), derivative(t, activation, params), found[0]))
    values = torch.stack(found)
    return values.amin(0), values.amax(0)


def _chord(l: Tensor, u: Tensor, activation: str, params: tuple[float, ...]) -> Tensor:
    w = u - l
    narrow = w < _NARROW
    sl, su = value(l, activation, params), value(u, activation, params)
    d = (su - sl) / torch.where(narrow, torch.ones_like(w), w)
    return torch.where(narrow, derivative(l + 0.5 * w, activation, params), d)


def _piecewise(activation: str, params: tuple[float, ...]) -> tuple[float, float, float, float] | None:
    """(left slope, lower kink, upper kink, right slope) of the piecewise linear ones, the slope between the kinks being
    1."""
    match activation:
        case "relu":
            return 0.0, 0.0, math.inf, 1.0
        case "leaky_relu":
            return params[0], 0.0, math.inf, 1.0
        case "hardtanh":
            return 0.0, params[0], params[1], 0.0
        case "relu6":
            return 0.0, 0.0, 6.0, 0.0
        case _:
            return None


def _relax_piecewise(
    l: Tensor,
    u: Tensor,
    kind: str,
    left: float,
    lo: float,
    hi: float,
    right: float,
    activation: str,
    params: tuple[float, ...],
) -> Lines:
    """Lines of x -> left (x - lo) + s(lo) | x + const | right (x - hi) + s(hi), with kinks at lo and hi."""
    below, above = u <= lo, l >= hi
    linear = (l >= lo) & (u <= hi)
    s_l, s_u = value(l, activation, params), value(u, activation, params)
    unstable = ~(below | above | linear)
    w = torch.where(unstable, u - l, torch.ones_like(l))
    one = torch.ones_like(l)
    chord = torch.where(unstable, (s_u - s_l) / w, torch.where(linear, one, torch.where(below, one * left, right)))
    base = [value(torch.full_like(l, k), activation, params) for k in (lo, hi) if math.isfinite(k)]
    knots = [torch.full_like(l, k) for k in (lo, hi) if math.isfinite(k)]
    # the exact line of a stable neuron passes through its kink: no cancellation, valid for l = u
    flat = torch.where(above, base[-1] - right * knots[-1], base[0] - left * knots[0])
    exact = torch.where(linear, base[0] - knots[0], flat)  # also where l = u is a kink: the slope there is 1
    if kind == "parallel":
        ends = [s_l - chord * l, s_u - chord * u] + [
            torch.where((l < k) & (k < u), v - chord * k, s_l - chord * l) for k, v in zip(knots, base, strict=False)
        ]
        if hi == math.inf:  # convex: both ends lie on the chord, the kink below it
            low, high = base[0] - chord * knots[0], left * l - chord * l if left else -chord * l
        else:
            stack = torch.stack(ends)
            low, high = stack.amin(0), stack.amax(0)
        return Lines(chord[None], torch.stack([torch.where(unstable, low, exact), torch.where(unstable, high, exact)]))
    # lower line through the lower kink, upper line through the upper kink: the slope that leaves the smaller area
    k_low = (s_u - base[0]) / torch.where(u > lo, u - lo, torch.ones_like(u))
    convex = unstable & (l < lo)
    d_low = torch.where(convex, torch.where(u - lo > lo - l, k_low, left), chord)
    b_low = torch.where(convex, base[0] - d_low * lo, s_l - chord * l)
    d_up, b_up = chord, (s_l - chord * l if hi != math.inf else (left - chord) * l)
    if hi != math.inf:
        k_up = (base[1] - s_l) / torch.where(l < hi, hi - l, torch.ones_like(l))
        concave = unstable & (u > hi)
        d_up = torch.where(concave, torch.where(hi - l > u - hi, k_up, right), chord)
        b_up = torch.where(concave, base[1] - d_up * hi, s_u - chord * u)
    return Lines(
        torch.stack([d_low, d_up]),
        torch.stack([torch.where(unstable, b_low, exact), torch.where(unstable, b_up, exact)]),
    )


def _second_derivative(x: Tensor, activation: str) -> Tensor:
    """s''(x) of the S-shaped ones."""
    d = derivative(x, activation)
    match activation:
        case "sigmoid":
            return -d * torch.tanh(0.5 * x)
        case "tanh":
            return -2.0 * torch.tanh(x) * d
        case _:
            return -2.0 * x * d * d


def _tangent_from(end: Tensor, far: Tensor, activation: str) -> Tensor:
    """t between 0 and ``far`` (the other side of 0 than ``end``) whose tangent passes through (end, s(end)); s is odd
    up to a constant. Differentiable in ``end`` by one implicit step."""
    with torch.no_grad():
        # the tangent at 0 does not cross s before end, those at far and at -end do
        a, b = torch.zeros_like(far), torch.where(far.abs() < end.abs(), far, -end)
        t, s_end = b, value(end, activation)
        for _ in range(24 if end.dtype == torch.float64 else 20):  # Newton's steps while they stay inside, else halves
            gap = value(t, activation) + derivative(t, activation) * (end - t) - s_end
            inner = gap * torch.sign(end) > 0
            a, b = torch.where(inner, t, a), torch.where(inner, b, t)
            step = t - gap / (_second_derivative(t, activation) * (end - t))
            t = torch.where((step - a) * (step - b) <= 0, step, 0.5 * (a + b))
    if not end.requires_grad:
        return t
    rate = (derivative(end, activation) - derivative(t, activation)).detach()
    denominator = (_second_derivative(t, activation) * (end - t)).detach()
    rate = torch.where(denominator.abs() > 1e-12, rate / torch.where(denominator == 0, 1.0, denominator), 0.0)
    return t + rate * (end - end.detach())


def _relax_s_shaped(l: Tensor, u: Tensor, activation: str) -> Lines:
    """Lines of sigmoid, tanh and arctan (convex below 0, concave above) that leave the least area.

    The area below a line is its value at the midpoint m times the width, and no upper line lies below the concave
    envelope of s. That envelope is the chord, or the tangent through (l, s(l)) up to its point of contact and s from
    there; the line that touches it at m is the chord, that tangent (CROWN's), or the tangent at m. Below likewise.
    """
    chord = _chord(l, u, activation, ())
    mid = l + 0.5 * (u - l)
    narrow = (u - l) < _NARROW
    mixed = (l < 0) & (u > 0) & ~narrow
    bend_low = (chord > derivative(l, activation)) & ~narrow  # the chord cuts s near l
    bend_up = (chord > derivative(u, activation)) & ~narrow
    one, minus = torch.ones_like(l), -torch.ones_like(l)
    t_low = _tangent_from(torch.where(mixed & bend_low, u, one), torch.where(mixed & bend_low, l, minus), activation)
    t_up = _tangent_from(torch.where(mixed & bend_up, l, minus), torch.where(mixed & bend_up, u, one), activation)
    t_low = torch.where(mixed & (t_low < mid), t_low, mid)
    t_up = torch.where(mixed & (t_up > mid), t_up, mid)
    d_low = torch.where(bend_low, derivative(t_low, activation), chord)
    d_up = torch.where(bend_up, derivative(t_up, activation), chord)
    b_low, _ = _intercepts(d_low, l, u, activation, ())
    _, b_up = _intercepts(d_up, l, u, activation, ())
    return Lines(torch.stack([d_low, d_up]), torch.stack([b_low, b_up]))


def _relax_by_midpoint(l: Tensor, u: Tensor, activation: str, params: tuple[float, ...]) -> Lines:
    """Adaptive lines of any activation: on each side the chord's slope or the derivative at the midpoint, whichever
    line is the tighter at the midpoint (it leaves the smaller area, too). Never looser there than the parallel lines.
    """
    mid = l + 0.5 * (u - l)
    slopes = torch.stack([_chord(l, u, activation, params), derivative(mid, activation, params)])
    ends = [_intercepts(d, l, u, activation, params) for d in slopes.unbind(0)]
    low, high = torch.stack([e[0] for e in ends]), torch.stack([e[1] for e in ends])
    best_low = (slopes * mid + low).detach().argmax(0, keepdim=True)
    best_high = (slopes * mid + high).detach().argmin(0, keepdim=True)
    take = lambda t, i: t.gather(0, i)[0]
    return Lines(
        torch.stack([take(slopes, best_low), take(slopes, best_high)]),
        torch.stack([take(low, best_low), take(high, best_high)]),
    )


def relax(
    lower: Tensor, upper: Tensor, activation: str, kind: str = "parallel", params: tuple[float, ...] = ()
) -> Lines:
    """Lines around an activation on [lower, upper] (module docstring). Needs lower <= upper; shapes equal.

    Non-finite ends: horizontal lines at the range of s, infinite where s is unbounded.
    """
    params = parameters_of(activation, params)
    if kind not in ("parallel", "crown"):
        raise ValueError(f"kind: got {kind!r}, expected 'parallel' or 'crown'")
    finite = torch.isfinite(upper - lower)
    l, u = lower, upper
    if not bool(finite.all()):
        l, u = torch.where(finite, lower, torch.zeros_like(l)), torch.where(finite, upper, torch.zeros_like(u))
    pieces = _piecewise(activation, params)
    if pieces is not None:
        lines = _relax_piecewise(l, u, kind, *pieces, activation, params)
    elif kind == "crown" and activation in ("sigmoid", "tanh", "arctan"):
        lines = _relax_s_shaped(l, u, activation)
    elif kind == "crown" and (activation == "softplus" or (activation == "elu" and params[0] <= 1)):
        d_up = _chord(l, u, activation, params)
        d_low = derivative(l + 0.5 * (u - l), activation, params)  # convex: tangent at the midpoint below, chord above
        low, high = _intercepts(d_low, l, u, activation, params)[0], _intercepts(d_up, l, u, activation, params)[1]
        lines = Lines(torch.stack([d_low, d_up]), torch.stack([low, high]))
    elif kind == "crown":
        lines = _relax_by_midpoint(l, u, activation, params)
    else:
        d = _chord(l, u, activation, params)
        lines = Lines(d[None], torch.stack(_intercepts(d, l, u, activation, params)))
    if bool(finite.all()):
        return lines
    low, high = interval_activation(lower, upper, activation, params)
    slopes = torch.where(finite, lines.slopes, torch.zeros_like(lines.slopes))
    intercepts = torch.where(finite, lines.intercepts, torch.stack([low, high]))
    return Lines(slopes, intercepts)
