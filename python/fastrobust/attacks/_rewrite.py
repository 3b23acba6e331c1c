"""A network's graph for input gradients only: batch normalisation folded, activations in place, layers fused
(torch.fx)."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..nn.masked import BinaryMaskedConv2d, BinaryMaskedLinear
from ._fused import RELU, Affine, Clamp, FusedConv, clamped_, packs

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TURNED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ADD = (operator.add, torch.add, operator.iadd, "add", "add_")
# modules that can work in place, and the functions that do
_CLAMPS: dict[type[nn.Module], Callable[[Any], Clamp]] = {
    nn.ReLU: lambda m: RELU,
    nn.ReLU6: lambda m: (0.0, 6.0),
    nn.Hardtanh: lambda m: (float(m.min_val), float(m.max_val)),
}
_RELU = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")


@dataclasses.dataclass
class Rewritten:
    graph: fx.GraphModule
    folded: list[str]  # normalisations that joined a layer
    kept: list[str]  # those that became a factor and a shift of each channel
    shapes: dict[str, tuple[int, ...]]  # of the nodes, for the example


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (BinaryMaskedConv2d, BinaryMaskedLinear)) or super().is_leaf_module(
            m, module_qualified_name
        )


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor on the way."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.found: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.found[n.name] = tuple(out.shape)
        return out


def norm_as_affine(norm: Any) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) in float64 of a normalisation in eval mode; None where it takes the statistics of the batch."""
    if type(norm) not in NORMS or norm.running_mean is None or norm.running_var is None:
        return None
    mean, variance = norm.running_mean.detach().double(), norm.running_var.detach().double()
    scale = (variance + float(norm.eps)).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def rewrite(model: nn.Module, x: Tensor) -> Rewritten:
    """``model``: a copy in eval mode that nobody else has; it is taken apart. Raises whatever torch.fx says to models
    that it cannot read."""
    graph = fx.GraphModule(model, _Tracer().trace(model))
    _without_writes(graph)
    _without_nothing(graph)
    shapes = _Shapes(graph)
    with torch.no_grad():
        shapes.run(x.clone())
    folded, kept = _fold_norms(graph, shapes.found)
    graph.requires_grad_(False)
    _finished(graph)
    return Rewritten(graph, folded, kept, shapes.found)


def _finished(graph: fx.GraphModule) -> None:
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _module(graph: fx.GraphModule, node: Any) -> nn.Module | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def _alone(node: fx.Node, reader: fx.Node) -> bool:
    """Whether ``reader`` alone reads node, and once."""
    return list(node.users) == [reader] and list(reader.all_input_nodes).count(node) == 1


def _put(graph: fx.GraphModule, node: fx.Node, module: nn.Module, word: str) -> None:
    """A module of its own for this call: the layer may be shared."""
    name, base, k = f"{word}_{node.name}", f"{word}_{node.name}", 0
    while hasattr(graph, name):
        k += 1
        name = f"{base}_{k}"
    graph.add_submodule(name, module)
    node.op, node.target, node.kwargs = "call_module", name, {}


def _clamp_of(graph: fx.GraphModule, node: fx.Node) -> Clamp | None:
    """What a node that is ReLU, ReLU6 or a hard tanh of one tensor clamps to."""
    module = _module(graph, node)
    if module is not None:
        make = _CLAMPS.get(type(module))
        return None if make is None else make(module)
    if node.op == "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target in _RELU:
        return RELU
    if node.target is F.relu6:
        return 0.0, 6.0
    if node.target is F.hardtanh:
        given = dict(zip(("min_val", "max_val"), node.args[1:3], strict=False)) | node.kwargs
        lo, hi = given.get("min_val", -1.0), given.get("max_val", 1.0)
        return (float(lo), float(hi)) if isinstance(lo, (int, float)) and isinstance(hi, (int, float)) else None
    return clamped_bounds(node)


def clamped_bounds(node: fx.Node) -> Clamp | None:
    """Of a clamp that an earlier pass put there."""
    if node.target is not clamped_:
        return None
    bounds: Any = node.args[1]
    return float(bounds[0]), float(bounds[1])


def _writes(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the call writes into its first argument."""
    module = _module(graph, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.kwargs.get("inplace") is True:
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    name = getattr(node.target, "__name__", "")
    return node.target in (operator.iadd, operator.isub, operator.imul) or (
        name.endswith("_") and not name.endswith("__")
    )


def _without_writes(graph: fx.GraphModule) -> None:
    """Who reads a tensor after it was written reads what was written, so that every value has one node."""
    nodes = list(graph.graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    for node in nodes:
        if node.op not in ("call_module", "call_method", "call_function") or not node.args:
            continue
        given = node.args[0]
        if isinstance(given, fx.Node) and _writes(graph, node):
            for reader in list(given.users):
                if place[reader] > place[node]:
                    reader.replace_input_with(given, node)


def _without_nothing(graph: fx.GraphModule) -> None:
    """Dropout in eval mode and identities go; views of maps in another layout must be allowed to copy."""
    for node in list(graph.graph.nodes):
        module = _module(graph, node)
        off = node.op == "call_function" and node.target is F.dropout and node.kwargs.get("training") is False
        if (type(module) in _NOTHING and len(node.args) == 1) or (off and isinstance(node.args[0], fx.Node)):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.op == "call_method" and node.target == "view" and not isinstance(node.args[1], torch.dtype):
            node.target = "reshape"


# ---- batch normalisation ----


def _fold_norms(graph: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    folded, kept = [], []
    for node in list(graph.graph.nodes):
        norm = _module(graph, node)
        sides = None if norm is None or len(node.args) != 1 or node.kwargs else norm_as_affine(norm)
        if norm is None or sides is None or not isinstance(node.args[0], fx.Node):
            continue
        before, name = node.args[0], str(node.target)
        layer = _module(graph, before)
        if layer is not None and _alone(before, node) and _takes_behind(layer, shapes.get(before.name, ())):
            _put(graph, before, _behind(layer, *sides), "folded")
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
            folded.append(name)
            continue
        readers = list(node.users)
        layer = _module(graph, readers[0]) if len(readers) == 1 else None
        if layer is not None and _alone(node, readers[0]) and _takes_ahead(layer, shapes.get(node.name, ())):
            _put(graph, readers[0], _ahead(layer, *sides), "folded")
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
            folded.append(name)
            continue
        dtype = _dtype(norm)
        _put(graph, node, Affine(sides[0].to(dtype), sides[1].to(dtype)), "affine")
        kept.append(name)
    return folded, kept


def _dtype(norm: Any) -> torch.dtype:
    found: torch.dtype = (norm.running_mean if norm.weight is None else norm.weight).dtype
    return found


def _takes_behind(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether what scales dimension 1 of the layer's outputs scales its outputs one by one."""
    return type(layer) in (*CONVS, *TURNED) or (type(layer) is nn.Linear and len(shape) == 2)


def _takes_ahead(layer: nn.Module, shape: tuple[int, ...]) -> bool:
    """A shift cannot pass the zeros of a padding, which come behind it."""
    if type(layer) in CONVS:
        return not isinstance(layer.padding, str) and not any(layer.padding)  # type: ignore[arg-type]
    return type(layer) is nn.Linear and len(shape) == 2


def _with(layer: Any, weight: Tensor, bias: Tensor) -> nn.Module:
    made: Any = copy.copy(layer)
    made._parameters = dict(layer._parameters)
    for name, value in (("weight", weight), ("bias", bias)):
        made._parameters[name] = nn.Parameter(value.to(layer.weight.dtype), requires_grad=False)
    assert isinstance(made, nn.Module)
    return made


def _behind(layer: Any, scale: Tensor, shift: Tensor) -> nn.Module:
    weight = layer.weight.detach().double()
    if type(layer) in TURNED:  # (inputs, outputs / groups, ...)
        own = scale.view(layer.groups, 1, -1, *(1,) * (weight.dim() - 2))
        weight = (weight.unflatten(0, (layer.groups, -1)) * own).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    return _with(layer, weight, shift if layer.bias is None else layer.bias.detach().double() * scale + shift)


def _ahead(layer: Any, scale: Tensor, shift: Tensor) -> nn.Module:
    weight, groups = layer.weight.detach().double(), getattr(layer, "groups", 1)
    parts = weight.unflatten(0, (groups, -1))  # (groups, outputs / groups, inputs / groups, ...)
    per = (groups, 1, -1, *(1,) * (weight.dim() - 2))
    bias = (parts * shift.view(per)).flatten(0, 1).flatten(1).sum(1)
    weight = (parts * scale.view(per)).flatten(0, 1)
    return _with(layer, weight, bias if layer.bias is None else layer.bias.detach().double() + bias)


# ---- activations ----

_PRODUCERS = (*CONVS, *TURNED, nn.Linear, *NORMS)


def can_fuse(found: Rewritten) -> bool:
    nodes = found.graph.graph.nodes
    layers = ((n, _module(found.graph, n)) for n in nodes)
    return any(type(m) is nn.Conv2d and packs(m.weight) and _fuses(m, n, found.shapes) for n, m in layers)


def in_place(graph: fx.GraphModule) -> None:
    """ReLU and its like write over what a layer has made, where nobody else reads it and no gradient needs it."""
    for node in list(graph.graph.nodes):
        clamp = _clamp_of(graph, node)
        if clamp is None or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        layer = _module(graph, before)
        if not _alone(before, node):
            continue
        if isinstance(layer, Affine) and layer.clamp is None:
            layer.clamp = clamp
            node.replace_all_uses_with(before)
            graph.graph.erase_node(node)
        elif type(layer) in _PRODUCERS or _adds(before) or (isinstance(layer, FusedConv) and layer.clamp is None):
            node.op, node.target, node.args, node.kwargs = "call_function", clamped_, (before, clamp), {}
    _finished(graph)


def _adds(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ADD


# ---- fused convolutions ----


def fuse(found: Rewritten, batch: int, names: list[dict[str, str]] | None = None) -> list[FusedConv]:
    """Convolutions of maps with the addition and the clamp behind them; their kernels are chosen for a batch of that
    size, or are those of ``names``, one for each layer."""
    graph, shapes = found.graph, found.shapes
    made: list[tuple[fx.Node, FusedConv]] = []
    for node in reversed(list(graph.graph.nodes)):  # of two summands that are layers the later one takes the other
        layer = _module(graph, node)
        if type(layer) is not nn.Conv2d or not _fuses(layer, node, shapes):
            continue
        chain, other, clamp = [node], None, None
        reader = _only_reader(node)
        if reader is not None and _sums(reader):
            second = reader.args[1] if reader.args[0] is node else reader.args[0]
            if isinstance(second, fx.Node) and shapes.get(second.name) == shapes[node.name]:
                chain.append(reader)
                other, reader = second, _only_reader(reader)
        if reader is not None and reader.args and reader.args[0] is chain[-1]:
            clamp = _clamp_of(graph, reader)
            chain += [reader] if clamp is not None else []
        fused = FusedConv(layer, clamp)
        with graph.graph.inserting_after(chain[-1]):
            new = graph.graph.call_module("", (node.args[0], other))
        _put(graph, new, fused, "fused")
        shapes[new.name] = shapes[node.name]
        chain[-1].replace_all_uses_with(new)
        for gone in reversed(chain):
            graph.graph.erase_node(gone)
        made.append((new, fused))
    made.reverse()
    for k, (node, fused) in enumerate(made):
        shape = shapes[str(node.args[0])]
        fused.choose(torch.Size((batch, *shape[1:])), node.args[1] is not None, None if names is None else names[k])
    in_place(graph)
    _owned_gradients(graph)
    _finished(graph)
    return [layer for _, layer in made]


def _fuses(layer: nn.Conv2d, node: fx.Node, shapes: dict[str, tuple[int, ...]]) -> bool:
    given = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    return (
        isinstance(given, fx.Node)
        and len(shapes.get(given.name, ())) == 4
        and node.name in shapes
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and _alone(node, readers[0]) else None


def _sums(node: fx.Node) -> bool:
    return _adds(node) and len(node.args) == 2 and not node.kwargs and node.op != "call_module"


def _owned_gradients(graph: fx.GraphModule) -> None:
    """Where all readers of a layer make a gradient that nobody else reads, the layer may write over it."""
    for node in graph.graph.nodes:
        layer = _module(graph, node)
        if isinstance(layer, (FusedConv, Affine)):
            layer.owns_gradient = bool(node.users) and all(_fresh(graph, node, reader) for reader in node.users)


def _fresh(graph: fx.GraphModule, node: fx.Node, reader: fx.Node) -> bool:
    layer = _module(graph, reader)
    if isinstance(layer, Affine):
        return True
    return isinstance(layer, FusedConv) and (layer.clamp is not None or node not in reader.args[1:])
