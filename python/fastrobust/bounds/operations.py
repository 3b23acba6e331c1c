"""The operations of torch that bounds are defined for, by the names of their schemas; and those that only move
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrobust._places import Constant, inside, replaced
from fastrobust._record import Step
from fastrobust.bounds import elementwise as E
from fastrobust.bounds import graph as G
from fastrobust.bounds import layers as L
from fastrobust.bounds import products as P
from fastrobust.bounds.builder import Ref, Tracked, per_example
from fastrobust.reference.functions import FUNCTIONS

if TYPE_CHECKING:
    from fastrobust.bounds.lowering import Lowering

Args = dict[str, Any]


def concatenate(b: Lowering, a: Args) -> Ref:
    tensors, dim = list(a["tensors"]), a.get("dim", 0)
    stacked = a["step"].name == "stack"
    n = len(b.size)
    dim %= n
    parts: list[Ref] = []
    lead = dim > 0 and b.size[0] == 1
    for t in tensors:
        size = t.size if isinstance(t, Tracked) else tuple(t.tensor.shape)
        if stacked:
            size = (*size[:dim], 1, *size[dim:])
        if 0 in size:
            continue
        if isinstance(t, Tracked):
            parts.append(b.to_shape(t.ref, size[1:] if lead else size))
            continue
        inner, b.size = b.size, size
        get, own = b.constant(t), per_example(size)
        parts.append(b.to_shape(E.fixed(b, lambda g=get, s=own: g().reshape(s)), size[1:] if lead else size))
        b.size = inner
    shape = b.size[1:] if lead else b.size
    if len(parts) == 1:
        return b.to_shape(parts[0], per_example(b.size))
    joined = b.add(G.Concat(tuple(p.index for p in parts), shape, b.where, dim=dim - 1 if lead else dim))
    return b.to_shape(joined, per_example(b.size))


def moved(b: Lowering, a: Args) -> Ref:
    """Operations that move numbers, and fill in a constant: run once on the positions themselves."""
    step: Step = a["step"]
    tracked = [v for v in a.values() if isinstance(v, Tracked)]
    if len(tracked) != 1 or not isinstance(a.get("self", a.get("input")), Tracked):
        raise b.fail(f"operation {step.name}", " with places that depend on the input")
    x = tracked[0]
    if any(isinstance(v, Constant) for v in inside((step.args, step.kwargs))):
        b.baked = True  # the places are numbers of this call

    def run(t: Tensor) -> Tensor:
        put = lambda v: v.tensor.cpu() if isinstance(v, Constant) else t  # noqa: E731
        out: Tensor = step.func(*replaced(step.args, put), **replaced(step.kwargs, put))
        return out

    zero = run(torch.zeros(x.size, dtype=torch.float64))
    out = b.moved(x, lambda t: run(t) - zero)
    if not zero.any():
        return out.ref
    shift = zero.reshape(per_example(b.size))  # cast to what it meets
    return b.affine(out.ref, None, lambda: shift)


def interpolated(b: Lowering, a: Args) -> Ref:
    """Interpolations with weights that are not negative, map by map."""
    step: Step = a["step"]
    dims = 1 if "1d" in step.name else 2
    x = L.as_maps(b, a["self"], dims)
    out = per_example(b.size)

    def function(t: Tensor) -> Tensor:
        return step.func(t, *step.args[1:], **step.kwargs)

    shape = tuple(function(torch.empty(1, *b.shape(x), device="meta")).shape[1:])
    return b.to_shape(b.linear(x, function, shape, b.nodes[x.index].size), out)


_MOVING = (
    "flip", "roll", "rot90", "repeat", "index_select", "gather", "take", "index", "_unsafe_index", "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
    "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "upsample_nearest1d", "upsample_nearest2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "im2col", "tril", "triu", "repeat_interleave",
    "diag_embed", "unfold_copy",
    "permute_copy", "slice_copy", "expand_copy", "view_copy", "narrow_copy", "select_copy", "t_copy",
    "transpose_copy", "squeeze_copy",
    "unsqueeze_copy", "as_strided_copy", "alias_copy", "detach_copy", "diagonal_copy",
)  # fmt: skip
HANDLERS: dict[str, Callable[[Lowering, Args], Ref]] = {
    "add": E.add(1), "sub": E.add(-1), "subtract": E.add(-1), "rsub": E.add(-1, swapped=True), "mul": E.multiply,
    "multiply": E.multiply,
    "div": E.divide, "divide": E.divide, "true_divide": E.divide, "neg": lambda b, a: b.affine(a["self"].ref, -1.0),
    "relu": E.activation("relu"), "leaky_relu": E.activation("leaky_relu", "negative_slope"),
    "hardtanh": E.activation("hardtanh", "min_val", "max_val"), "relu6": E.activation("relu6"),
    "sigmoid": E.activation("sigmoid"),
    "tanh": E.activation("tanh"), "atan": E.activation("arctan"), "arctan": E.activation("arctan"),
    "softplus": E.activation("softplus", "beta", "threshold"), "silu": E.activation("silu"), "elu": E.elu,
    "celu": E.celu,
    "gelu": lambda b, a: b.activation(a["self"].ref, "gelu_tanh" if a["approximate"] == "tanh" else "gelu"),
    "hardsigmoid": E.hardsigmoid, "_prelu_kernel": E.prelu, "prelu": E.prelu, "threshold": E.threshold,
    "rrelu_with_noise": E.rrelu,
    "clamp": E.clamp, "clip": E.clamp, "clamp_min": E.clamp, "clamp_max": E.clamp, "maximum": E.extreme(1),
    "minimum": E.extreme(-1),
    "abs": E.absolute, "absolute": E.absolute, "where": E.choose, "masked_fill": E.masked_fill,
    "clone": E.same, "contiguous": E.same, "_unsafe_view": E.same, "_to_copy": E.same, "alias": E.same,
    "detach": E.same, "to": E.same,
    "lift_fresh": E.same, "view": E.same, "reshape": E.same, "_reshape_copy": E.same, "positive": E.same,
    "native_dropout": lambda b, a: a["input"].ref,
    "copy": E.copy, "fill": E.fill, "zero": E.fill, "mean": E.reduced(True), "sum": E.reduced(False),
    "mm": lambda b, a: b.to_shape(L.matmul(b, a["self"], a["mat2"], b.size), per_example(b.size)), "addmm": L.addmm,
    "bmm": L.bmm,
    "baddbmm": L.bmm, "mv": L.mv, "addmv": L.mv, "dot": L.mv, "linear": L.linear, "convolution": L.convolution,
    "native_batch_norm": L.batch_norm, "_native_batch_norm_legit_no_training": L.batch_norm,
    "_native_batch_norm_legit": L.batch_norm,
    "cudnn_batch_norm": L.batch_norm, "miopen_batch_norm": L.batch_norm, "_batch_norm_no_update": L.batch_norm,
    "avg_pool2d": L.avg_pool2d, "_adaptive_avg_pool2d": L.adaptive_avg_pool2d, "max_pool2d_with_indices": L.max_pool2d,
    "max_pool2d": L.max_pool2d, "adaptive_max_pool2d": L.adaptive_max_pool2d, "amax": L.extreme_of(1),
    "amin": L.extreme_of(-1),
    "max": lambda b, a: (E.extreme(1) if "other" in a else L.extreme_of(1))(b, a),
    "min": lambda b, a: (E.extreme(-1) if "other" in a else L.extreme_of(-1))(b, a),
    **{name: P.function(name) for name in FUNCTIONS}, "pow": P.power, "_softmax": P.softmax, "softmax": P.softmax,
    "_safe_softmax": P.softmax, "native_layer_norm": P.layer_norm, "native_group_norm": P.group_norm,
    "var": P.variance(False), "std": P.variance(True), "linalg_vector_norm": P.vector_norm, "glu": P.gated,
    "cat": concatenate, "stack": concatenate, "upsample_linear1d": interpolated, "upsample_bilinear2d": interpolated,
    **dict.fromkeys(_MOVING, moved),
    **dict.fromkeys(("cumsum", "upsample_bicubic2d", "upsample_trilinear3d", "avg_pool3d", "_adaptive_avg_pool3d",
    "col2im"), L.by_matrix),
}  # fmt: skip
