"""Polyhedral envelope certification (Liu 2022, section 3.3.1, Lemma 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrobust.bounds import METHODS, LinearBounds, SlopeSearch, compute_bounds
from fastrobust.bounds.checks import check_inputs, check_labels, check_method, check_options
from fastrobust.ops import polyhedral_distance
from fastrobust.ops.bounds import needs_grad
from fastrobust.reference.bounds import Clip
from fastrobust.reference.polyhedron import round_down

from .._eager import left_to_python

_PIECE = 1 << 18  # coefficients

LINEAR_METHODS = tuple(name for name, (_, kind) in METHODS.items() if kind is not None)


@dataclass
class Envelope:
    """What one call of the linear bounds proves about a batch.

    radius: (B,) no adversarial example is closer to x than this: ``min(eps, distance)``, and eps where certified. With
        ``at`` closer to that point, and ``eps - ||at - x||_p`` takes the place of eps: the bounds hold in the ball
        around x alone.
    distance: (B,) d_y, the distance of x (or ``at``) to the envelope; at most 0 when the bounds fail at that point
    itself.
    certified: (B,) bool, the linear margins are positive on the whole input set (what Fast-Lin, KW and CROWN certify).
    distances: (B, K - 1), d_iy per other class, ascending without y.
    """

    radius: Tensor
    distance: Tensor
    certified: Tensor
    distances: Tensor


def margins_at(linear: LinearBounds, x: Tensor, outward: bool = False) -> Tensor:
    """U_i x + p_i (B, K - 1) of (3.12), summed in float64 and rounded down: float32 sums could overstate it.

    ``outward`` also subtracts what the float64 sum may be wrong by, (n + 2) u of the sum of the absolute values.
    """
    if x.dtype == torch.float64:
        return linear.lower_at(x)
    A, b, points = linear.lower_A.flatten(2), linear.lower_b, x.flatten(1)
    recorded = needs_grad(A, b, points)
    step = len(x) if recorded or not x.is_cpu else max(1, _PIECE // max(1, A[0].numel()))
    pieces = zip(A.split(step), b.split(step), points.split(step), strict=True)  # what float64 takes stays in the cache
    return torch.cat([_margins(*piece, x.dtype, outward) for piece in pieces])


def _margins(A: Tensor, b: Tensor, x: Tensor, dtype: torch.dtype, outward: bool) -> Tensor:
    rows, point, offset = A.double(), x.double().unsqueeze(2), b.double()
    value = torch.bmm(rows, point).squeeze(2) + offset
    if outward:
        with torch.no_grad():
            size = torch.bmm(rows.abs(), point.abs()).squeeze(2) + offset.abs()
        value = value - (rows.shape[2] + 8) * 2.0**-53 * size
    return round_down(value, dtype)


def _less(end: float | Tensor, x: Tensor) -> Tensor:
    """end - x as (B, 1, n), rounded down to x's dtype."""
    point = x.flatten(1).unsqueeze(1)
    if not isinstance(end, Tensor) and end == 0:
        return -point
    if not isinstance(end, Tensor):
        end = torch.tensor(end, dtype=torch.float64, device=x.device)
    elif end.dim():
        end = end.expand_as(x).flatten(1).unsqueeze(1)
    if x.dtype == torch.float64:
        return end - point
    if end.dtype != x.dtype:
        end = round_down(end, x.dtype)
    value = end - point
    with torch.no_grad():  # TwoSum: what the difference lost, exactly
        part = value - end
        lost = (end - (value - part)) - (point + part)
        down = torch.where(lost < 0, torch.nextafter(value, value.new_tensor(-math.inf)), value)
    return value + (down - value).detach() if value.requires_grad else down


def box_around(x: Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """(low - x, high - x) as (B, 1, n), rounded outwards; without a box one infinite element."""
    if clip is None:
        return x.new_full((1,), -math.inf), x.new_full((1,), math.inf)
    return _less(clip[0], x), -_less(-clip[1], -x)


def eps_like(eps: float | Tensor, x: Tensor) -> Tensor:
    """eps as (B,) of x's dtype, rounded down: what may be reported as a certified radius."""
    value = eps if isinstance(eps, Tensor) else torch.tensor(eps, dtype=torch.float64, device=x.device)
    if value.dim() > 1:
        raise ValueError(f"eps: got shape {tuple(value.shape)}, expected a number or ({x.shape[0]},)")
    return round_down(value.double(), x.dtype).to(x.device).expand(x.shape[0])


@left_to_python
def polyhedral_envelope(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    norm: float | str = math.inf,
    clip: Clip = None,
    at: Tensor | None = None,
    method: str = "fast-lin",
    signed: bool = False,
    rounding: str = "nearest",
    exact_input: bool = False,
    refine: str = "unstable",
    max_memory: int = 1 << 30,
    slopes: SlopeSearch | None = None,
) -> Envelope:
    r"""Certified radii from one call of the linear bounds (Lemma 3.1, and problem 3.14 when ``clip`` is given).

    The bounds over ||d||_p <= eps give z_y - z_i >= U_i x' + p_i there, so no adversarial example is nearer than

    .. math:: \min\{\epsilon, \min_{i \ne y} d_{iy}\}, \quad d_{iy} = \min \|d\|_p
              \text{ s.t. } U_i (x + d) + p_i \le 0, \; x + d \in clip.

    Where Fast-Lin, KW and CROWN prove nothing because a margin is negative somewhere in the ball, the distance to the
    envelope still is a radius. Without ``clip`` the distance is (U_i x + p_i) / ||U_i||_q.

    Args:
        model: classifier that ``fastrobust.bounds`` supports, float32 (float64 for checking).
        x, y: (B, *shape) inside clip, and (B,) labels of any integer type.
        eps: a number or (B,): radius of the ball on which the bounds are computed.
        norm: 1, 2, inf or any p > 1. clip: (low, high) that bounds the attacker, numbers or tensors that broadcast to
        x, or None.
        at: points x' of x's shape inside clip (adversarial examples) from which the distances are taken, with the box
            around them, where the rows (U, p) stay those of the ball around x (PER+at, section 3.3.3); None: from x.
        method: any linear method of :func:`fastrobust.bounds.compute_bounds`: "fast-lin" (KW), "crown", "crown-ibp",
            "ibp-linear", "alpha-crown" (with ``slopes``).
        signed: distances of classes with a violated margin are minus the distance back to the envelope, not 0
            (the regulariser of section 3.3.3 needs them).
        rounding: "nearest", or "outward" for a certificate that holds in real arithmetic and for every float32
            evaluation order of the network (x and the parameters as they are; see ``docs/bounds.md`` for what that
            covers).
        exact_input, refine, max_memory, slopes: as for :func:`fastrobust.bounds.compute_bounds`; ``refine="all"`` is
            what the thesis' tables were made with.

    Returns:
        :class:`Envelope`. Differentiable with respect to the parameters, x, at and eps. A row that nothing in clip
        fulfils has distance inf, one that all of clip violates -inf with ``signed``, both without a gradient.

    Raises:
        ValueError, TypeError: naming the argument (shapes, labels, x outside clip, values that are not finite).
    """
    x, eps, p, clip = check_inputs(x, eps, norm, clip)
    y = check_labels(y, x.shape[0], x.device)
    method = check_method(method, LINEAR_METHODS)
    check_options(rounding, refine, exact_input, max_memory)
    if isinstance(eps, Tensor) and eps.dim() > 1:
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, expected a number or ({x.shape[0]},)")
    point = x if at is None else _check_point(at, x, clip)
    if x.shape[0] == 0:
        none = x.new_zeros(0)
        return Envelope(none, none, none.bool(), x.new_zeros(0, 0))
    options: dict[str, Any] = {
        "rounding": rounding, "exact_input": exact_input, "refine": refine, "max_memory": max_memory, "slopes": slopes,
    }  # fmt: skip
    faces = envelope_faces(model, x, y, eps, p, clip, method, point, signed, **options)
    distances, margins = faces.distances, faces.margins
    distance = distances.amin(1)
    certified = faces.lower.amin(1) > 0
    limit = eps_like(eps, x)
    if at is not None:
        limit = _left(limit, point.double() - x.double(), p)
    # a margin that is not positive at x proves nothing; comparisons are false for NaN, which is never a certificate
    sound = margins.amin(1) > 0
    nearest = torch.where(distance < limit, distance, limit)
    radius = torch.where(certified, limit, torch.where(sound & (distance > 0), nearest, torch.zeros_like(limit)))
    return Envelope(radius, distance, certified, distances)


class Faces(NamedTuple):
    """The rows of an envelope: U (B, K - 1, n), U x' + p at the point (B, K - 1), their distances from it (B, K - 1),
    and the lower bounds of the margins on the whole input set (B, K - 1)."""

    rows: Tensor
    margins: Tensor
    distances: Tensor
    lower: Tensor


def envelope_faces(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    p: float,
    clip: Clip,
    method: str,
    at: Tensor,
    signed: bool,
    **options: Any,
) -> Faces:
    """:func:`polyhedral_envelope` before anything is made of the distances; the arguments are checked already."""
    bounds = compute_bounds(
        model, x, eps, norm=p, clip=clip, method=method, labels=y, return_linear=True, sides="lower", **options
    )
    linear = bounds.linear
    assert linear is not None
    low, high = box_around(at, clip)
    margins = margins_at(linear, at, options.get("rounding") == "outward")
    rows = linear.lower_A.flatten(2)
    distances = polyhedral_distance(rows, margins, low, high, p, signed=signed)
    assert isinstance(distances, Tensor)
    return Faces(rows, margins, distances, bounds.lower)


def _check_point(at: Tensor, x: Tensor, clip: Clip) -> Tensor:
    if not isinstance(at, Tensor):
        raise TypeError(f"at: got {type(at).__name__}, expected a tensor of x's shape")
    if (at.shape, at.dtype, at.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"at: got {tuple(at.shape)} {at.dtype} on {at.device}, expected {tuple(x.shape)} {x.dtype} on {x.device}, "
            "as x is"
        )
    try:
        check_inputs(at, 0.0, math.inf, clip)
    except ValueError as error:
        raise ValueError(str(error).replace("x:", "at:", 1)) from None
    return at


def _left(limit: Tensor, moved: Tensor, p: float) -> Tensor:
    """What of the radius is left around a point that lies ``moved`` from the centre, rounded down, at least 0."""
    away = moved.detach().flatten(1).norm(p, 1)
    left = (limit.double() - away * (1 + 1e-12)).clamp(min=0)  # the norm's own rounding, generously
    if not limit.requires_grad:
        return round_down(left, limit.dtype)
    return torch.where(left > 0, limit - (limit - round_down(left, limit.dtype)).detach(), torch.zeros_like(limit))
