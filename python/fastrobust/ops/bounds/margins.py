"""Linear bounds over a box with lines from intervals (CROWN-IBP, IBP-inspired) for plain ReLU networks: all layers in
one op.

Kernels in a row, nothing between them: every map is flat with its channels innermost, the ReLU after an interval
product, its lines and the intercepts with the product's bias come from one pass, and the gradients of all of it are
written by hand. The definition is the engine of :mod:`fastrobust.bounds`, which takes everything else. float32 on the
CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from . import _autograd as gradients
from . import _chain as chain
from . import _conv as conv
from . import linear
from ._live import LiveStep, concretize_live, leaving_out_pays, live_gradient
from ._product import matrix_product, sign_product
from ._relu_box import relu_box, relu_box_gradient
from ._rows import address, dense, turned
from .intervals import center_linear

_CENTER = 0
_MANY = 64  # rows from which on tables of sums pay
_FEW = 0.6  # living neurons up to which leaving out the others pays more
Image = tuple[int, int, int]


class Layer(NamedTuple):
    """A product that a ReLU follows; channels, height and width of its input and of its result. A vector has one
    position."""

    dense: bool
    shape_in: Image
    shape: Image
    stride: tuple[int, int]
    padding: tuple[int, int]


class Rows(NamedTuple):
    """The rows: outputs ``plus`` (less ``minus``) of each row's ``example``, as many of each and one after the other;
    lower bounds, or both."""

    example: Tensor
    plus: Tensor
    minus: Tensor | None
    sides: int


class _Lines(NamedTuple):
    """What one layer leaves: centre and radius of its product, its ReLU's lines, centre and radius of its ReLU."""

    center: Tensor
    radius: Tensor
    slopes: Tensor
    intercepts: Tensor
    next: tuple[Tensor, Tensor] | None
    living: float  # the share of neurons that have lines


def relu_margins(
    layers: list[Layer],
    weights: list[Tensor],
    biases: list[Tensor | None],
    center: Tensor,
    radius: Tensor,
    shared: bool,
    rows: Rows,
    adaptive: bool,
) -> Tensor:
    """Bounds (sides, R) of rows of outputs over [center - radius, center + radius].

    center, radius: (B, n), channels innermost; shared: radius is the same for every example and needs no gradient.
    weights, biases: those of ``layers`` from the input on, then of the last dense layer. adaptive: CROWN's lines, else
    those of one slope.
    """
    if not linear.needs_grad(center, radius, *weights, *biases):
        return _forward(layers, weights, biases, center, radius, shared, rows, adaptive, None)
    out: Tensor = _Margins.apply(layers, shared, rows, adaptive, center, radius, *weights, *biases)
    return out


def _channels_last(weight: Tensor, image: Image) -> Tensor:
    """The weight of a dense layer (m, n) behind an image, with its columns in channels-last order."""
    if image[0] == 1 or image[1] * image[2] == 1:
        return dense(weight)
    return turned(weight, len(weight), image[0], image[1] * image[2]).view(weight.shape)


def _channels_first(grad: Tensor, image: Image) -> Tensor:
    if image[0] == 1 or image[1] * image[2] == 1:
        return grad
    return turned(grad, len(grad), image[1] * image[2], image[0]).view(grad.shape)


def _image(t: Tensor, shape: Image) -> Tensor:
    """(B, n), channels innermost, as (B, C, H, W)."""
    return t.view(-1, shape[1], shape[2], shape[0]).permute(0, 3, 1, 2)


def _flat(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).reshape(len(t), -1)


def _lines(layer: Layer, w: Tensor, bias: Tensor | None, c: Tensor, r: Tensor, adaptive: bool, last: bool) -> _Lines:
    """Intervals through one layer; r (B, n), or (1, n) for all."""
    if layer.dense:
        c, r = center_linear(c, r, w, bias, _CENTER)
    else:
        maps = _image(c, layer.shape_in), _image(r, layer.shape_in)
        c, r = map(_flat, conv.interval_convolution(*maps, w, bias, layer.stride, layer.padding, _CENTER))
    box = relu_box(c, r, bias, layer.shape[0], adaptive, not last)
    assert box.lines is not None
    return _Lines(c, r, *box.lines, box.after, box.living)


def _forward(
    layers: list[Layer],
    weights: list[Tensor],
    biases: list[Tensor | None],
    center: Tensor,
    radius: Tensor,
    shared: bool,
    rows: Rows,
    adaptive: bool,
    kept: dict[str, Any] | None,
) -> Tensor:
    """The bounds; what the gradients need is put into ``kept``."""
    ws = [
        _channels_last(w, layer.shape_in) if layer.dense else dense(w)
        for layer, w in zip(layers, weights, strict=False)
    ]
    bs = [None if b is None else dense(b) for b in biases]
    lines: list[_Lines] = []
    c, r = center, (radius[:1] if shared else radius)
    for i, layer in enumerate(layers):
        lines.append(_lines(layer, ws[i], bs[i], c, r, adaptive, i + 1 == len(layers)))
        if lines[i].next is not None:
            c, r = lines[i].next  # type: ignore[misc]
    A, last = _channels_last(weights[-1], layers[-1].shape)[None], bs[-1]
    pick: Any = (rows.plus, rows.minus)
    per = len(rows.plus) // max(1, len(center))
    groups = torch.arange(0, len(rows.plus) + 1, max(1, per)), None
    if last is None:
        b = A.new_zeros(rows.sides, len(rows.plus))
    else:
        b = A.new_empty(1, len(rows.plus))
        _C.bounds_picked(last.data_ptr(), rows.plus.data_ptr(), address(rows.minus), b.data_ptr(), b.shape[1])
        b = b.expand(rows.sides, -1)
    if kept is not None:
        kept.update(ws=ws, bs=bs, lines=lines, given=[], between=None, below=None, groups=groups)
    box = (center, radius)
    for i in range(len(layers) - 1, -1, -1):
        s, t = lines[i].slopes, lines[i].intercepts
        if kept is None or i == 0 or not layers[i].dense:
            live = _live_steps(layers[: i + 1], ws, lines)
            apart = rows.sides == 2 and adaptive
            if leaving_out_pays(live, per * (1 + apart), [known.living for known in reversed(lines[: i + 1])]):
                below: Any = None
                if kept is not None:
                    kept["given"].append((A, pick))
                    if layers[i].dense:
                        kept["below"] = b.new_empty(1 + apart, *b.shape[1:], center.shape[1])
                        below = [kept["below"]]
                    else:
                        below = kept["between"] = chain.between_of(live, A.shape[0], b)
                return concretize_live(A, b, rows.example, live, box, None, 1.0, pick[0], pick[1], below, groups)
        if not layers[i].dense:
            steps = _steps(layers[: i + 1], ws, lines)
            between = None
            if kept is not None:
                kept["given"].append((A, pick))
                kept["between"] = between = chain.between_of(steps, A.shape[0], b)
            return chain.through(A, b, rows.example, steps, box, None, 1.0, pick[0], None, None, pick[1], between)
        scaled, b = linear._back_kernel(A, b, s, t, rows.example, pick[0], pick[1], None, None, [])
        if kept is not None:
            kept["given"].append((A, pick, scaled))
        A, pick = matrix_product(scaled.flatten(0, 1), ws[i]).unflatten(0, scaled.shape[:2]), (None, None)
    if kept is not None:
        kept["given"].append((A, pick))
    return linear._concretize_kernel(
        A, b, rows.example, pick[0], pick[1], center, radius, None, None, 1.0, None, None, []
    )


def _steps(layers: list[Layer], ws: list[Tensor], lines: list[_Lines]) -> list[chain.ConvStep]:
    """From the last of these convolutions to the input."""
    return [
        chain.ConvStep(lines[i].slopes, lines[i].intercepts, s.shape, ws[i], s.stride, s.padding, s.shape_in)
        for i, s in reversed(list(enumerate(layers)))
    ]


def _live_steps(layers: list[Layer], ws: list[Tensor], lines: list[_Lines]) -> list[LiveStep]:
    found = []
    for i, s in reversed(list(enumerate(layers))):
        w = ws[i]
        if s.dense:
            c, height, width = s.shape_in
            w = w.view(-1, height, width, c).permute(0, 3, 1, 2)
        found.append(LiveStep(lines[i].slopes, lines[i].intercepts, s.shape, w, s.stride, s.padding, s.shape_in))
    return found


class _Margins(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layers: list[Layer],
        shared: bool,
        rows: Rows,
        adaptive: bool,
        center: Tensor,
        radius: Tensor,
        *parameters: Any,
    ) -> Tensor:
        half = len(layers) + 1
        weights, biases = list(parameters[:half]), list(parameters[half:])
        ctx.kept = {}
        ctx.told = layers, shared, rows, adaptive
        ctx.save_for_backward(center, radius, *parameters)
        return _forward(layers, weights, biases, center, radius, shared, rows, adaptive, ctx.kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        center, radius, *parameters = ctx.saved_tensors
        need = ctx.needs_input_grad[4:]
        layers, shared, rows, adaptive = ctx.told
        to_c, to_r, to_w, to_b = _gradients(
            layers, shared, rows, adaptive, center, radius, parameters, ctx.kept, dense(g), need[0] or need[1]
        )
        found = [t if n else None for t, n in zip([to_c, to_r, *to_w, *to_b], need, strict=True)]
        return (None, None, None, None, *found)


def _gradients(
    layers: list[Layer],
    shared: bool,
    rows: Rows,
    adaptive: bool,
    center: Tensor,
    radius: Tensor,
    parameters: list[Any],
    kept: dict[str, Any],
    g: Tensor,
    input_too: bool,
) -> tuple[Any, ...]:
    """Of centre, radius, weights and biases, from those of the bounds."""
    count = len(layers)
    ws, lines, given = kept["ws"], kept["lines"], list(kept["given"])
    to_w: list[Any] = [None] * (count + 1)
    to_b: list[Any] = [None] * (count + 1)
    to_lines: list[Any] = [None] * count
    example, groups = rows.example, kept["groups"]
    to_c = to_r = through_center = None
    # the rows, from the input up
    A, pick, *_ = given.pop()
    first = count - len(given)  # layers below this one went through one kernel
    if layers[0].dense:
        below: Any = kept["below"]
        scaled: Any = None
        found = None
        lined = (lines[0].slopes, lines[0].intercepts)
        live = below is not None
        if not live:
            below, (A, pick, scaled) = A, given.pop()
        if shared and lines[0].living >= _FEW:
            if live:
                scaled = linear._back_kernel(A, torch.zeros_like(g), *lined, example, pick[0], pick[1], None, None, [])[
                    0
                ]
            found = _from_signs(below, scaled, ws[0], kept["bs"][0], lines[0], radius[0], g, example)
        if found is None:
            args = [below, g, example, None, None, center, radius, None, None, 1.0, None, None, []]
            to_below, to_c, to_r = gradients.concretize_rows_kernel(args, [False] * 5 + [input_too] * 2, g, groups)
        if live and found is None:
            step = _live_steps(layers[:1], ws, lines)[0]
            to_a, to_lines[0], to_w[0] = live_gradient(A, pick[0], pick[1], example, step, to_below, g, groups)
            if pick[0] is not None:
                to_w[count] = to_a
        else:
            to_scaled, to_w[0], through_center = found or (*_product_gradient(scaled, ws[0], to_below), None)
            args = [A, g, *lined, example, *pick, None, None, []]
            to_a, *to_lines[0] = gradients.back_rows_kernel(args, to_scaled, g, groups)
        first = 1
    else:
        steps = _steps(layers[:first], ws, lines)
        need = (input_too, input_too, [True] * first)
        to_a, to_c, to_r, of_steps = chain.chain_gradient(
            A, example, pick[0], pick[1], center, radius, steps, g, need, kept["between"], groups, True
        )
        for i, (s, t, w) in zip(range(first - 1, -1, -1), of_steps, strict=True):
            to_lines[i], to_w[i] = (s, t), w
    for i in range(first, count):
        A, pick, scaled = given.pop()
        to_scaled, to_w[i] = _product_gradient(scaled, ws[i], to_a)
        args = [A, g, lines[i].slopes, lines[i].intercepts, example, *pick, None, None, []]
        to_a, *to_lines[i] = gradients.back_rows_kernel(args, to_scaled, g, groups)
    rows_of_last = len(parameters[count])
    if to_w[count] is None:
        to_w[count] = gradients.pick_gradient(to_a[0], rows.plus, rows.minus, rows_of_last)
    to_w[count] = _channels_first(to_w[count], layers[-1].shape)
    whole = g if len(g) == 1 else g.sum(0, keepdim=True)
    to_b[count] = gradients.pick_gradient(whole.view(-1, 1), rows.plus, rows.minus, rows_of_last).view(-1)
    # the intervals, from the last layer down
    from_next: tuple[Any, Any] = (None, None)
    for i in range(count - 1, -1, -1):
        inputs = (center, radius[:1] if shared else radius) if i == 0 else lines[i - 1].next
        through = i > 0 or input_too
        to_b[i], to_w[i], from_next = _layer_gradients(
            layers[i],
            ws[i],
            kept["bs"][i],
            inputs,
            lines[i],
            to_lines[i],
            from_next,
            adaptive,
            to_w[i],
            through,
            None if i else through_center,
        )
    if input_too:
        to_c, to_r = to_c + from_next[0], to_r + from_next[1]
    return to_c, to_r, to_w, to_b


def _factors(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The derivative of the bounds of rows a with respect to a is f c + h sign(a) r: f and h (k R,) from g (sides, R),
    where k matrices serve the sides."""
    if len(g) == 1:
        return g[0], -g[0]
    if k == 2:
        return g.view(-1), torch.cat([-g[0], g[1]])
    return g[0] + g[1], g[1] - g[0]


def _product_gradient(scaled: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Of scaled (k, R, m) and W (m, n) from that of their product."""
    g = g.flatten(0, 1)
    to_scaled = matrix_product(g, w.t()).unflatten(0, scaled.shape[:2])
    return to_scaled, matrix_product(scaled.flatten(0, 1).t(), g)


def _from_signs(
    A: Tensor, scaled: Tensor, w: Tensor, bias: Tensor | None, lines: _Lines, radius: Tensor, g: Tensor, example: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """For rows A (k, R, n) = scaled W, scaled (k, R, m), that meet one radius (n,) in every example: gradients of
    ``scaled``, of W as far as the radius goes and of W c (B, m), c the centres. With respect to a the derivative of a
    bound is f c + h sign(a) r: what c multiplies is known from the intervals, and products with signs are cheap. None
    where this is not the way."""
    k, rows, n = A.shape
    m, batch = len(w), len(lines.center)
    if min(rows, n) < _MANY or m < 16:
        return None
    f, h = _factors(g, k)
    flat, given = A.flatten(0, 1), scaled.flatten(0, 1)
    to_scaled, to_w = torch.empty_like(given), torch.empty_like(w)
    base = lines.center if bias is None else lines.center - bias, f, example.repeat(k)
    if not (
        sign_product(flat.t(), given, radius, to_w.t(), h) and sign_product(flat, w.t(), h, to_scaled, radius, base)
    ):
        return None
    through = torch.bmm(f.view(k * batch, 1, -1), given.view(k * batch, -1, m)).view(k, batch, m)
    return to_scaled.view(k, rows, m), to_w, through[0] if k == 1 else through.sum(0)


def _layer_gradients(
    layer: Layer,
    w: Tensor,
    bias: Tensor | None,
    inputs: tuple[Tensor, Tensor],
    lines: _Lines,
    to_lines: Any,
    from_next: Any,
    adaptive: bool,
    to_w: Tensor,
    through: bool,
    more: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Any, Any]]:
    """Of the bias and the weight (plus ``to_w``, of the rows), and of centre and radius of the input where they go
    ``through``. more: what else the product with the centre has."""
    c, r = inputs
    batch, n = lines.center.shape
    one = len(r) != batch or lines.radius.stride(0) == 0
    g_c, g_r, to_bias = relu_box_gradient(
        lines.center, lines.radius, one, bias, layer.shape[0], adaptive, to_lines, from_next
    )
    if more is not None:
        g_c += more
    to_c = to_r = None
    if layer.dense:
        to_c, to_r = (torch.empty_like(t) if through else None for t in (c, r))
        _C.bounds_interval_grad(
            c.data_ptr(),
            r.data_ptr(),
            w.data_ptr(),
            g_c.data_ptr(),
            g_r.data_ptr(),
            to_w.data_ptr(),
            address(to_c),
            address(to_r),
            batch,
            len(r),
            c.shape[1],
            n,
        )
        return to_bias, _channels_first(to_w, layer.shape_in), (to_c, to_r)
    grads = _image(g_c, layer.shape), _image(g_r, layer.shape)
    to_w = to_w + conv.interval_weight_gradient(
        _image(c, layer.shape_in), _image(r, layer.shape_in), w, grads[0], grads[1], layer.stride, layer.padding
    )
    if through:
        size = layer.shape_in[1:]
        to_c, to_r = (
            _flat(conv.adjoint(t, v, layer.stride, layer.padding, size))
            for t, v in zip(grads, (w, w.abs()), strict=True)
        )
    return to_bias, to_w, (to_c, to_r)
