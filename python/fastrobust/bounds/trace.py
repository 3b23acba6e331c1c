"""The graph of a model: recorded as it runs, lowered, kept while nothing changes, and compared with the model itself.

A model made of torch's own layers alone does what its attributes say, so its graph is kept while those stay. Any other
model may read anything in its forward: it is recorded anew at every call (one forward of one example), and the graph
is kept while the record stays the same.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _module

from fastrobust._record import UnreadableModelError, record, unwrapped
from fastrobust.bounds import graph as G
from fastrobust.bounds.lowering import Lowering
from fastrobust.bounds.operations import HANDLERS
from fastrobust.bounds.plan import form, normal_form
from fastrobust.bounds.self_check import check_graph


@dataclass(slots=True)
class Traced:
    graph: G.Graph
    lowered: G.Graph  # operation by operation as the model computes
    output: Tensor | None  # what the model gave for the first example, where this call ran it


@dataclass(slots=True)
class _Kept:
    key: Any
    shape: tuple[int, ...]
    graph: G.Graph
    lowered: G.Graph
    held: Any  # tensors that the key names by address
    batches: set[int] = field(default_factory=set)  # sizes of batches that the model was compared on


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[str, _Kept]] = weakref.WeakKeyDictionary()
_BATCHES: weakref.WeakKeyDictionary[nn.Module, set[int]] = weakref.WeakKeyDictionary()  # where no graph is kept
_READ: dict[type, tuple[str, ...]] = {  # what the common layers read in forward; of others all attributes are compared
    nn.Sequential: (), nn.Linear: (), nn.ReLU: ("inplace",), nn.Sigmoid: (), nn.Tanh: (), nn.Identity: (),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice"),
}  # fmt: skip


def _attributes(model: nn.Module) -> tuple[Any, ...] | None:
    """All that a model of torch's own layers computes from; None for a model that may compute from anything."""
    out: list[Any] = []
    left: list[Any] = [model]
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return None
    while left:
        m = left.pop()
        kind = type(m)
        read = _READ.get(kind)
        own = m.__dict__
        if read is None and not kind.__module__.startswith("torch.nn.modules."):
            return None
        if (
            "forward" in own
            or own.get("_compiled_call_impl") is not None
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
        ):
            return None
        out += (id(m), kind.forward)
        if read is not None:
            if "weight" in own or "bias" in own:  # in place of the parameters
                return None
            out.extend([own.get(k) for k in read])
        else:
            for k, v in own.items():
                if isinstance(v, (int, float, str, bool, tuple, list, type(None))):
                    out.append((k, repr(v)))
                elif k not in _INTERNAL and not k.startswith("_"):
                    return None
        for held in ("_modules", "_parameters", "_buffers"):
            if own[held]:
                out.extend(map(id, own[held].values()))
        left.extend(child for child in own["_modules"].values() if child is not None)
    return tuple(out)


_INTERNAL = frozenset(nn.Module().__dict__)


def first_parameter(model: Any) -> Tensor | None:
    """``next(model.parameters(), None)``, without the generators that cost as much as a small kernel."""
    if not isinstance(model, nn.Module):
        return None
    for p in model._parameters.values():
        if p is not None:
            return p
    for child in model._modules.values():
        found = None if child is None else first_parameter(child)
        if found is not None:
            return found
    return None


def plain_graph(model: Any, x: Tensor) -> G.Graph | None:
    """The graph of a model of torch's own layers alone; None for any other, which has to be recorded at every call."""
    values = _attributes(model) if isinstance(model, nn.Module) else None
    first = first_parameter(model)
    if values is None or first is None or (first.dtype, first.device) != (x.dtype, x.device):
        return None
    hit = _CACHE.get(model, {}).get(form())
    known = hit is not None and hit.shape == tuple(x.shape[1:]) and isinstance(hit.key, _Attributes)
    if hit is not None and known and hit.key.values == values:
        return hit.graph
    return trace(model, x).graph


@dataclass(slots=True)
class _Attributes:
    values: tuple[Any, ...]


def trace(model: Any, x: Tensor, exact: bool = False, every: bool = False) -> Traced:
    """The graph of ``model`` for inputs like x (B, *shape), checked against the model on examples of x when it is new
    (``every``: at every call, on all of x), in its normal form. ``exact``: layer by layer as the model computes, with
    parameters in float64."""
    model = unwrapped(model)
    shape = tuple(x.shape[1:])
    module = isinstance(model, nn.Module)
    plain = _attributes(model) if module else None
    held = _CACHE.setdefault(model, {}) if module else {}
    kind = "exact" if exact else form()
    hit = held.get(kind)
    if hit is not None and hit.shape != shape:
        hit = None
    if hit is not None and plain is not None and isinstance(hit.key, _Attributes) and hit.key.values == plain:
        if every:
            check_graph(model, hit.lowered, x, True)
        return Traced(hit.graph, hit.lowered, None)
    one = x[:1] if len(x) else x.new_zeros(1, *shape)
    recording = _recorded(model, one, False)
    output = recording.result if isinstance(recording.result, Tensor) else None
    if hit is not None and plain is None and not recording.computed and hit.key == recording.key:
        graph, lowered, batches = hit.graph, hit.lowered, hit.batches
    else:
        # Once more, with the names of what runs: a model may change what it does, or its tensors, only between calls.
        named = _recorded(model, one, True)
        lowering = Lowering(named, shape, HANDLERS)
        with torch.no_grad(), torch.inference_mode(False):  # the graph's own constants serve recorded calls, too
            lowered = lowering.build()
            graph = lowered if kind != "normal" else normal_form(lowered)
        known = module and lowering.baked and model in _BATCHES  # read at every call: its form was compared before
        check_graph(model, lowered, x, other=None if graph is lowered or known else graph)
        if exact:
            for node in graph.nodes:
                if isinstance(node, (G.Dense, G.Conv, G.ConvTranspose)):
                    node.get_weight, node.get_bias = _in_double(node.get_weight), _in_double(node.get_bias)
        if module and not lowering.baked:
            key = _Attributes(plain) if plain is not None else named.key
            held[kind] = _Kept(key, shape, graph, lowered, named.held)
            batches = held[kind].batches
        else:
            held.pop(kind, None)
            batches = _BATCHES.setdefault(model, set()) if module else set()
    # What a model does may depend on the size of the batch, which the record of one example does not show.
    if every or plain is None and len(x) > 1 and len(x) not in batches:
        check_graph(model, lowered, x, True)
        batches.add(len(x))
    return Traced(graph, lowered, output)


def _recorded(model: Any, one: Tensor, named: bool) -> Any:
    try:
        return record(model, one, named=named)
    except UnreadableModelError:
        raise
    except TypeError as error:
        if "positional argument" in str(error) and "forward" in str(error):
            raise ValueError(f"model: forward needs more than one input ({error}), expected one") from error
        raise ValueError(
            f"model: failed on one example of shape {tuple(one.shape)} ({type(error).__name__}: {error})"
        ) from error
    except (RuntimeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"model: failed on one example of shape {tuple(one.shape)} ({type(error).__name__}: {error})"
        ) from error


def _in_double(get: G.Getter) -> G.Getter:
    def double() -> Tensor | None:
        t = get()
        return None if t is None else t.double()

    return G.Derived(double)
