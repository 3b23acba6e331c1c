"""compute_bounds: sound bounds of a network's outputs over a set of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from fastrobust._heap import keep_pages
from fastrobust._input_sets import Clip, input_box
from fastrobust.bounds import graph as G
from fastrobust.bounds import outward as O
from fastrobust.bounds.builder import UnsupportedLayerError
from fastrobust.bounds.checks import check_inputs, check_method, check_options, check_spec, explain_not_finite
from fastrobust.bounds.decisions import declined, took
from fastrobust.bounds.engine import METHODS, Engine
from fastrobust.bounds.intervals import small_margins
from fastrobust.bounds.region import Region
from fastrobust.bounds.results import Bounds, LinearBounds, Options
from fastrobust.bounds.self_check import check_contained
from fastrobust.bounds.slope_search import Wanted, best_rows
from fastrobust.bounds.slopes import SlopeSearch
from fastrobust.bounds.stage_margins import Asked, margins_of_stages
from fastrobust.bounds.trace import first_parameter, trace
from fastrobust.ops._library import full_precision
from fastrobust.ops.bounds import check_norm, finite
from fastrobust.ops.bounds._stage import Rows

from .._eager import left_to_python

if TYPE_CHECKING:
    from typing_extensions import Unpack

Model: TypeAlias = "nn.Module | Callable[[Tensor], Tensor]"
Eps: TypeAlias = "float | Tensor | Any"  # any number, list or array that broadcasts to x


@overload
def compute_bounds(
    model: Model, x: Tensor, eps: Eps, *, sides: Literal["both"] = "both", **options: Unpack[Options]
) -> Bounds[Tensor, Tensor]: ...
@overload
def compute_bounds(
    model: Model, x: Tensor, eps: Eps, *, sides: Literal["lower"], **options: Unpack[Options]
) -> Bounds[Tensor, None]: ...
@overload
def compute_bounds(
    model: Model, x: Tensor, eps: Eps, *, sides: Literal["upper"], **options: Unpack[Options]
) -> Bounds[None, Tensor]: ...
@overload
def compute_bounds(
    model: Model, x: Tensor, eps: Eps, *, sides: str, **options: Unpack[Options]
) -> Bounds[Any, Any]: ...
@G.values_once
@left_to_python
def compute_bounds(
    model: Model,
    x: Tensor,
    eps: Eps,
    *,
    norm: float | str = math.inf,
    clip: Clip = None,
    method: str = "crown-ibp",
    labels: Any = None,
    spec: Tensor | None = None,
    rounding: str = "nearest",
    return_linear: bool = False,
    return_intermediate: bool = False,
    sides: str = "both",
    intersect: bool = False,
    exact_input: bool = False,
    refine: str = "unstable",
    max_memory: int = 1 << 30,
    check: str = "one",
    slopes: SlopeSearch | None = None,
) -> Bounds[Any, Any]:
    """Bounds of model(x + d) over ||d||_p <= eps (and x + d in ``clip``).

    x: (B, *shape) float32 or float64. eps: a float, (B,), or x's shape (then the set is {x + eps * v : ||v||_p <= 1}).
    norm: 1, 2, inf or any p >= 1. method: "ibp" (Algorithm 3.2), "ibp-linear" (IBP-inspired linear bounds, section
    3.3.1), "crown-ibp", "fast-lin" (same-slope lines, Algorithm 3.1), "crown" (adaptive lines); thesis chapter 3, CROWN
    (Zhang et al. 2018); "alpha-crown" (Xu et al. 2021): CROWN, then lines chosen for each output row by ``slopes``
    (:class:`SlopeSearch`: iterations, lr, decay, stop); never looser than CROWN.
    labels: (B,) int64: bounds of the margins z_y - z_j, (B, K - 1), j ascending without y, with the last layer elided.
    spec: (S, K) or (B, S, K): bounds of spec @ z. Neither: bounds of the outputs.
    sides: "both", or "lower" or "upper" alone, which halves the work of adaptive lines. intersect=True also takes the
    interval bounds wherever they are tighter. Over a ball cut by ``clip`` (p < inf) linear bounds take the exact
    extreme; the first layer's intervals take the tighter of ball and box, as the thesis' tables do, and with
    exact_input=True "fast-lin" and "crown" bound its unstable neurons exactly too.
    refine: which hidden neurons "fast-lin" and "crown" bound linearly: "unstable" (the rest keep their intervals, which
    is faster and can be tighter) or "all" (Algorithm 3.1 as it is written, and the figures of the thesis).
    max_memory: bytes that the coefficients of one chunk of rows may use. Differentiable in x, eps and the parameters.
    check: what is compared with the model itself before bounds are returned: "one" example a call, "all" of them, or
    "none". What is read of a model that is new, or does something new, is compared on several points whatever ``check``
    says.

    Raises ValueError or TypeError, naming the argument, for inputs that are not finite, shapes that do not fit, layers
    that are not supported (UnsupportedLayerError), models that no reading can stand for (UnreadableModelError: branches
    on values, random numbers, training mode), models that do not compute what was read (ModelMismatchError), and
    parameters or bounds that are not finite.
    """
    method = check_method(method, METHODS)
    if slopes is not None and method != "alpha-crown":
        raise ValueError(f"slopes: got {slopes} with method {method!r}, expected None, or method 'alpha-crown'")
    if sides not in ("both", "lower", "upper"):
        raise ValueError(f"sides: got {sides!r}, expected 'both', 'lower' or 'upper'")
    check_options(rounding, refine, exact_input, max_memory)
    norm = check_norm(norm)
    if check not in ("one", "all", "none"):
        raise ValueError(f"check: got {check!r}, expected 'one', 'all' or 'none'")
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):  # bounds are of the model in its own precision
            return compute_bounds(
                model, x, eps, norm=norm, clip=clip, method=method, labels=labels, spec=spec, rounding=rounding,
                return_linear=return_linear, return_intermediate=return_intermediate, sides=sides, intersect=intersect,
                exact_input=exact_input, refine=refine, max_memory=max_memory, check=check, slopes=slopes,
            )  # fmt: skip
    usual = spec is None and rounding == "nearest" and norm == math.inf and not (return_linear or return_intermediate)
    if method == "ibp" and labels is not None and usual:
        quick = small_margins(model, x, eps, clip, labels, 1 if sides == "lower" else 2)
        if quick is not None:
            ends = quick[0] if sides != "upper" else None, quick[1] if sides != "lower" else None
            _compare(check, model, x, None, labels, spec, *ends)
            return Bounds(*ends)
    x, eps, p, clip = check_inputs(x, eps, norm, clip)
    outward = rounding == "outward"
    if outward and x.dtype != torch.float32:
        raise TypeError(f"x: got {x.dtype}, expected float32 with rounding='outward'")
    if return_linear and METHODS[method][1] is None:
        raise ValueError("return_linear: method 'ibp' has no linear bounds; use 'ibp-linear'")
    parameter = first_parameter(model)
    if parameter is not None and (parameter.dtype, parameter.device) != (x.dtype, x.device):
        raise ValueError(
            f"x: is {x.dtype} on {x.device}, the model's parameters are {parameter.dtype} on {parameter.device}"
        )
    traced = trace(model, x, outward, check == "all")
    graph = traced.graph
    _check_log_softmax(graph, labels, spec, outward)
    inner, radius, cut = (x, eps, clip) if graph.entry is None else graph.entry.region(x, eps, clip)
    if method == "ibp" and labels is not None and usual and traced.output is not None:  # a model that had to be read
        quick = small_margins(model, x, eps, clip, labels, 1 if sides == "lower" else 2, graph)
        if quick is not None:
            ends = quick[0] if sides != "upper" else None, quick[1] if sides != "lower" else None
            _compare(check, model, x, traced.output, labels, spec, *ends)
            return Bounds(*ends)
    example, plus, minus, matrix = check_spec(labels, spec, x, graph.nodes[graph.output].shape)
    output = graph.nodes[graph.output]
    count, negative = (
        2 if sides == "both" else 1,
        sides == "upper",
    )  # an upper bound is minus the lower one of minus the row
    if x.is_cpu:
        keep_pages()
    first, second = (minus, plus) if negative else (plus, minus)
    taken: tuple[Tensor, Any] | None = None
    if why := _no_op(rounding, return_intermediate, len(example)):
        declined("graph op", why)
    else:
        if first is None:  # rows of a matrix, or negated outputs
            first, second = torch.arange(len(example), device=x.device) if plus is None else plus, None
        asked = Asked(Rows(example, first, second, count), matrix, negative and minus is None, return_linear)
        with full_precision(x):
            if method != "ibp" or labels is not None or spec is not None:
                taken = margins_of_stages(graph, inner, radius, p, cut, method, asked, max_memory)
            if taken is not None and intersect and method != "ibp":
                other = margins_of_stages(graph, inner, radius, p, cut, "ibp", asked._replace(keep=False), max_memory)
                taken = None if other is None else (_tighter(taken[0], other[0]), taken[1])
    if taken is not None:
        out, kept = taken
        like = graph.result if labels is None and spec is None else (-1,)
        low, up = _sides(out.view(count, x.shape[0], *like), negative)
        if not all(t is None or finite(t) for t in (low, up)):
            explain_not_finite(model, low, up)
        _compare(check, model, x, traced.output, labels, spec, low, up)
        if kept is None:
            return Bounds(low, up)
        box = input_box(inner, radius, cut)
        return Bounds(low, up, _at_input(_kept_bounds(kept, (low, up), inner, box, False, negative), graph))
    if outward:
        wide = radius.double() if isinstance(radius, Tensor) else radius
        region = Region(inner.double(), wide, p, cut, O.RELATIVE)
        matrix = None if matrix is None else matrix.double()
    else:
        region = Region(inner, radius.to(x.dtype) if isinstance(radius, Tensor) else radius, p, cut)
    took("walk")
    engine = Engine(
        graph,
        region,
        method,
        max_memory,
        intersect,
        return_intermediate,
        outward,
        exact_input,
        refine,
        slopes or SlopeSearch(),
    )
    kept = None
    with full_precision(x):
        plain = labels is None and spec is None
        direct = plain and engine.kind is None
        engine.forward(graph.output if direct or intersect or outward else _frontier(graph))
        if direct:
            ends = engine.boxes[graph.output].ends
            low, up = ends[0] if sides != "upper" else None, ends[1] if sides != "lower" else None
        else:
            # without rows or lines there is nothing to choose
            searches = engine.search is not None and len(example) > 0 and len(engine.lines) > 0
            keeps = return_linear and not searches
            out, kept = engine.final(example, plus, minus, matrix, count, keeps, negative)
            if searches and engine.search is not None:
                wanted = Wanted(graph.output, example, plus, minus, matrix, negative)
                out, kept = best_rows(engine, wanted, engine.search, out, return_linear)
            if intersect and engine.kind is not None:
                out = engine.intersected(out, example, plus, minus, matrix, count, negative)
            shape = (x.shape[0], *graph.result) if plain else (x.shape[0], -1 if x.shape[0] else 0)
            if x.shape[0] == 0 and not plain:
                shape = (0, output.size - 1 if labels is not None else _rows_of_spec(spec))
            low, up = _sides(out.view(count, *shape), negative)
    if plain:
        low, up = (None if t is None else t.reshape(x.shape[0], *graph.result) for t in (low, up))
    if outward:
        low, up = None if low is None else O.round_down(low), None if up is None else O.round_up(up)
    if not all(t is None or finite(t) for t in (low, up)):
        explain_not_finite(model, low, up)
    _compare(check, model, x, traced.output, labels, spec, low, up)
    rows = None
    if kept is not None:
        rows = _at_input(_kept_bounds(kept, (low, up), inner, region.ends, outward, negative), graph)
    return Bounds(low, up, rows, engine.intermediate() if return_intermediate else {})


def _check_log_softmax(graph: G.Graph, labels: Any, spec: Tensor | None, outward: bool) -> None:
    """A model that ends in log_softmax is bounded before it, which leaves differences of outputs as they are."""
    if not graph.log_softmax:
        return
    if labels is None and (spec is None or bool(((spec.double() if outward else spec).sum(-1) != 0).any())):
        raise UnsupportedLayerError(
            "model: it ends in log_softmax, whose own values have no bounds here, but margins are those of what it "
            "reads; give labels, or a spec whose rows sum to 0"
        )


def _no_op(rounding: str, intermediate: bool, rows: int) -> str:
    """Why no op alone gives the bounds that are asked for; empty where one may."""
    if rounding != "nearest":
        return "outward rounding goes node by node in float64"
    if intermediate:
        return "return_intermediate asks for the hidden bounds"
    return "" if rows else "there are no rows to bound"


def _compare(
    check: str,
    model: Any,
    x: Tensor,
    output: Tensor | None,
    labels: Tensor | None,
    spec: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
) -> None:
    """The bounds with the outputs of the first example (already known as ``output``, or not), or of all."""
    if check == "none" or not len(x):
        return
    one = check == "one"
    cut = lambda t: t if t is None or not one else t[:1]  # noqa: E731
    rows = cut(labels), spec if spec is None or spec.dim() == 2 else cut(spec)
    check_contained(
        model,
        cut(x),
        output if one else None,
        rows,
        (cut(low), cut(up)),
        lambda: trace(model, cut(x), every=True).lowered,
    )


def _tighter(out: Tensor, other: Tensor) -> Tensor:
    return torch.stack(
        [torch.maximum(out[0], other[0]), *(torch.minimum(*t) for t in zip(out[1:], other[1:], strict=True))]
    )


def _sides(out: Tensor, negative: bool) -> tuple[Tensor | None, Tensor | None]:
    """(lower, upper) from the bounds of the rows, or from the lower bounds of their negatives."""
    if negative:
        return None, -out[0]
    return out[0], out[1] if len(out) == 2 else None


def _kept_bounds(
    kept: tuple[Tensor, Tensor],
    asked: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    box: tuple[Tensor, Tensor],
    outward: bool,
    negative: bool,
) -> LinearBounds:
    """From coefficients (1 or 2, rows of all examples, ...) and offsets (sides, rows) of the bounds that were ``asked``
    for."""
    A, b = kept
    count = len(b)
    lead = next(t for t in asked if t is not None).flatten(1).shape
    A, b = A.view(A.shape[0], *lead, *x.shape[1:]), b.view(b.shape[0], *lead)
    low, up = box
    if outward:
        near = A.float()
        moved = ((A - near.double()).abs() * torch.maximum(low.abs(), up.abs()).unsqueeze(1)).flatten(3).sum(3) * (
            1 + O.RELATIVE
        )
        ends = [O.round_down(b[0] - moved[0] - O.RELATIVE * b[0].abs())]
        if count == 2:
            ends.append(O.round_up(b[1] + moved[-1] + O.RELATIVE * b[1].abs()))
        A, b, low, up = near, torch.stack(ends), O.round_down(low), O.round_up(up)
    if negative:
        return LinearBounds(None, None, -A[0], -b[0], low, up)
    return LinearBounds(A[0], b[0], A[-1] if count == 2 else None, b[1] if count == 2 else None, low, up)


def _at_input(linear: LinearBounds, graph: G.Graph) -> LinearBounds:
    """Linear bounds of what the model makes of its input first, as such of the input."""
    if graph.entry is not None:
        for name in ("lower_A", "upper_A", "input_lower", "input_upper"):
            t = getattr(linear, name)
            setattr(linear, name, None if t is None else graph.entry.restored(t))
    return linear


def _rows_of_spec(spec: Tensor | None) -> int:
    return 0 if spec is None else spec.shape[-2]


def _frontier(graph: G.Graph) -> int:
    """The last nonlinear node before the output (the linear rest is merged with the rows), or the input."""
    wanted = graph.ancestors[graph.output]
    return max((i for i in wanted if not isinstance(graph.nodes[i], G.LinearNode)), default=0)
