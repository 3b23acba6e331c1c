"""Independent float64 definitions of the PGD family, random data, and checks of the numerics contract."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastrobust.reference import square as reference_square
from fastrobust.reference.square import NO_WINDOW, Settle, Window

INF = math.inf
NORMS = (INF, 2, 1)
BATCHES = (0, 1, 3, 7, 16)
SHAPES = ((), (1,), (5,), (16,), (17,), (1, 4, 4), (3, 7, 9), (3, 32, 32))


def images(
    seed: int, batch: int, shape: tuple[int, ...], clip: tuple[float, float] | None = (0.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """x in and around the box, x0 in the box (some values on its faces), gradient of mixed sign with some zeros."""
    g = torch.Generator().manual_seed(seed)
    lo, hi = clip if clip is not None else (-2.0, 2.0)
    size = (batch, *shape)
    # faces of the box as float32 has them, inside
    low, high = inside_box((lo, hi))
    u = torch.rand(size, generator=g)
    x0 = (low + (high - low) * u).clamp(low, high)
    x0 = torch.where(u < 0.1, low, torch.where(u > 0.9, high, x0)).float()
    x = x0 + 0.2 * torch.randn(size, generator=g)
    grad = torch.randn(size, generator=g)
    grad = torch.where(torch.rand(size, generator=g) < 0.1, 0.0, grad)
    return x, x0, grad


def inside_box(clip: tuple[float, float]) -> tuple[float, float]:
    """The largest float32 interval inside the float64 one."""
    lo, hi = (torch.tensor(c, dtype=torch.float32) for c in clip)
    if lo.item() < clip[0]:
        lo = torch.nextafter(lo, torch.tensor(INF))
    if hi.item() > clip[1]:
        hi = torch.nextafter(hi, torch.tensor(-INF))
    return lo.item(), hi.item()


def sizes(d: Tensor, norm: float) -> Tensor:
    """(B,) norms in float64, sums by math.fsum (exactly rounded)."""
    rows = d.double().reshape(d.shape[0], math.prod(d.shape[1:])).tolist()
    if norm == INF:
        return torch.tensor([max(map(abs, r), default=0.0) for r in rows], dtype=torch.float64)
    if norm == 2:
        return torch.tensor([math.sqrt(math.fsum(v * v for v in r)) for r in rows], dtype=torch.float64)
    return torch.tensor([math.fsum(map(abs, r)) for r in rows], dtype=torch.float64)


def assert_in_ball_and_box(
    y: Tensor, x0: Tensor, eps: float | Tensor, norm: float, clip: tuple[float, float] | None
) -> None:
    """||y - x0|| <= eps and lo <= y <= hi in float64, without any tolerance."""
    assert not y.isnan().any()
    wide, radius = y.double(), eps.double() if isinstance(eps, Tensor) else eps
    if isinstance(radius, Tensor) and radius.dim() == y.dim() and radius.shape == y.shape and y.dim() != 1:
        assert ((wide - x0.double()).abs() <= radius).all()
    else:
        assert (sizes(wide - x0.double(), norm) <= radius).all()
    if clip is not None:
        assert (wide >= clip[0]).all() and (wide <= clip[1]).all()


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def rows(value: float | Tensor, x: Tensor) -> Tensor:
    """A parameter in float64, to be broadcast against x."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    wide = value.double()
    return wide if wide.dim() == x.dim() else wide.reshape(-1, *[1] * (x.dim() - 1))


def step64(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    step: float | Tensor,
    eps: float | Tensor,
    norm: float,
    clip: tuple[float, float] | None,
) -> Tensor:
    """One PGD step in float64, written anew: no code of the library."""
    lo, hi = clip if clip is not None else (-INF, INF)
    x, x0, g = x.double(), x0.double(), grad.double().nan_to_num(nan=0.0)
    s, e = rows(step, x), rows(eps, x)
    dims = tuple(range(1, x.dim()))
    total = (lambda t: t.sum(dims, keepdim=True)) if dims else (lambda t: t)
    if not x.shape[0]:
        return x
    if norm == INF:
        return torch.minimum(torch.maximum(x + s * g.sign(), x0 - e), x0 + e).clamp(lo, hi)
    if norm == 2:
        length = total(g * g).sqrt()
        y = x + torch.where(length > 0, s * g / length, 0)
        d = y - x0
        size = total(d * d).sqrt()
        return (x0 + d * torch.where(size > e, e / size, 1)).clamp(lo, hi)
    y = torch.stack(
        [
            l1_ascent(*parts, lo, hi)
            for parts in zip(x, g, s.expand(x.shape[0], *[1] * len(dims)).reshape(-1), strict=True)
        ]
    )
    return torch.stack(
        [
            l1_projection(*parts, lo, hi)
            for parts in zip(y, x0, e.expand(x.shape[0], *[1] * len(dims)).reshape(-1), strict=True)
        ]
    )


def l1_ascent(x: Tensor, g: Tensor, step: Tensor | float, lo: float, hi: float) -> Tensor:
    """max <g, p>, ||p||_1 <= step, lo <= x + p <= hi for one example: a loop over the coordinates in order of |g|."""
    y, gradient, left = x.flatten().tolist(), g.flatten().tolist(), float(step)
    for i in sorted(range(len(y)), key=lambda i: (-abs(gradient[i]), i)):
        if gradient[i] == 0 or left <= 0:
            break
        take = min(left, max(hi - y[i] if gradient[i] > 0 else y[i] - lo, 0.0))
        y[i] += math.copysign(take, gradient[i])
        left -= take
    return torch.tensor(y, dtype=torch.float64).reshape(x.shape)


def l1_best_by_enumeration(x: Tensor, g: Tensor, step: float, lo: float, hi: float) -> float:
    """The largest <g, p> over all vertices with at most one coordinate off its face: exact for small n."""
    gl = g.tolist()
    room = [hi - a if b > 0 else a - lo for a, b in zip(x.tolist(), gl, strict=True)]
    best, n = 0.0, len(gl)
    for full in itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1)):
        used = sum(room[i] for i in full)
        if used > step:
            continue
        gain = sum(room[i] * abs(gl[i]) for i in full)
        rest = [min(room[i], step - used) * abs(gl[i]) for i in range(n) if i not in full]
        best = max(best, gain + max(rest, default=0.0))
    return best


def l1_projection(y: Tensor, x0: Tensor, eps: Tensor | float, lo: float, hi: float) -> Tensor:
    """The point of ball and box nearest to y, one example: the multiplier from the sorted breakpoints of its
    equation."""
    radius = float(eps)
    d = (y - x0).flatten()
    room = torch.where(d > 0, hi - x0.flatten(), x0.flatten() - lo)
    length = lambda lam: torch.minimum((d.abs() - lam).clamp_min(0), room)
    if length(0.0).sum() <= radius:
        return y.clamp(lo, hi)
    breaks = (
        torch.cat([d.abs(), (d.abs() - room).clamp_min(0), torch.zeros(1, dtype=torch.float64)]).sort().values.tolist()
    )
    low, high = 0, len(breaks) - 1
    while high - low > 1:  # the segment on which the length crosses the radius
        mid = (low + high) // 2
        low, high = (mid, high) if length(breaks[mid]).sum() > radius else (low, mid)
    above, below = length(breaks[low]).sum(), length(breaks[high]).sum()
    lam = breaks[low] + (breaks[high] - breaks[low]) * ((above - radius) / (above - below)).item()
    return (x0.flatten() + length(lam) * d.sign()).reshape(y.shape).clamp(lo, hi)


def assert_proposals_agree(propose: Callable[..., None], shape: tuple[int, int, int]) -> list[Tensor]:
    """Square's proposals, over some queries with ties, NaN scores and hits, against the definition; the state."""
    rng, batch = torch.Generator().manual_seed(2), 7
    draw = lambda *size: torch.rand(*size, generator=rng)
    x = draw(batch, *shape)
    low, high, numbers, fooled = x - draw(x.shape), x + draw(x.shape), torch.arange(batch) * 1001, draw(batch) > 0.8
    mine, want = ([x.clone(), x.clone(), draw(batch).round(), fooled.clone()] for _ in range(2))
    mine[2].copy_(want[2])
    last, score, hit = NO_WINDOW, None, None
    for query in range(12):
        side = (draw(2) * torch.tensor(shape[1:])).long() + 1
        window = NO_WINDOW if query == 5 else Window(query * 10**6, *side.tolist())
        for (x, new, value, fooled), call in ((mine, propose), (want, reference_square.square_propose)):
            settled = None if score is None or hit is None else Settle(score, hit, value, fooled)
            call(x, new, low, high, numbers, 2**64 - 3, last, window, settled)
        assert all(same_bits(a.float(), b.float()) for a, b in zip(mine, want, strict=True))
        last, score, hit = window, draw(batch).mul(3).round(), draw(batch) > 0.9
        score[query % batch] = math.nan
    return mine


def assert_moves_agree(move: Callable[..., None], shape: tuple[int, int, int], norm: float) -> None:
    """Square's proposals for norms 2 and 1 in float32, over some queries, against the definition in float64; what is
    settled, bit for bit."""
    rng, batch = torch.Generator().manual_seed(3), 5
    draw = lambda *size: torch.rand(*size, generator=rng)
    x0, numbers = draw(batch, *shape), torch.arange(batch) * 1001
    x, new, value, fooled = x0 + 0.1 * draw(x0.shape), torch.empty_like(x0), draw(batch), draw(batch) > 0.8
    x[0] = x0[0]
    score = hit = None
    for query in range(8):
        side = (draw(2) * torch.tensor(shape[1:])).long() + 1
        height, width = side.tolist() if query % 2 else [int(side.min())] * 2
        window = Window(query * 10**6, height, width)
        pattern = torch.randn(2, height, width, generator=rng)
        eps = 0.75 if query % 3 else torch.tensor([0.0, 0.1, 0.5, 1.0, 3.0])
        settled = None if score is None or hit is None else Settle(score, hit, value, fooled)
        want, points = x.clone(), (value.clone(), fooled.clone())
        if score is not None and hit is not None:
            taken = ((score > value) | hit) & ~fooled
            want[taken] = new[taken]
            points = torch.where(taken, score, value), fooled | (taken & hit)
        move(x, new, x0, numbers, 2**64 - 3, window, norm, eps, pattern, settled)
        assert same_bits(x, want) and same_bits(value, points[0]) and torch.equal(fooled, points[1])
        exactly, radius = torch.empty_like(x0).double(), eps.double() if isinstance(eps, Tensor) else eps
        reference_square.square_move(
            x.double(), exactly, x0.double(), numbers, 2**64 - 3, window, norm, radius, pattern.double(), None
        )
        far = max(1.0, float((exactly - x0).abs().max()))
        torch.testing.assert_close(new.double(), exactly, rtol=0, atol=1e-5 * far)
        score, hit = draw(batch), draw(batch) > 0.7
        score[query % batch] = math.nan
