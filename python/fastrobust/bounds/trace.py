"""From an ordinary nn.Module to a Graph, by torch.fx."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch.nn as nn
from torch import Tensor, fx

from fastrobust.bounds import graph as G
from fastrobust.bounds.builder import Builder, Ref, UnsupportedLayerError, unsupported
from fastrobust.bounds.layers import FUNCTIONS, METHODS, MODULES


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        if type(m).forward in MODULES:
            return True
        return type(m).__module__.startswith("torch.nn.modules") and not isinstance(
            m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
        )


class _Walk(Builder):
    """Runs over the traced program. ``baked``: values that were computed from parameters, which a later call must compute again."""

    baked = False

    def build(self) -> G.Graph:
        try:
            traced = _Tracer().trace(self.model)
        except UnsupportedLayerError:
            raise
        except Exception as error:
            raise ValueError(f"model: torch.fx cannot trace {type(self.model).__name__} ({error}); its forward must not branch on values") from error  # fmt: skip
        modules = dict(self.model.named_modules(remove_duplicate=False))
        env: dict[fx.Node, Any] = {}
        self.held: set[fx.Node] = set()  # steps whose value is the module's own tensor, or computed from one
        placeholders = [n for n in traced.nodes if n.op == "placeholder"]
        required = [n for n in placeholders if not n.args]
        if len(required) > 1:
            raise ValueError(f"model: forward takes {len(required)} inputs, expected one")
        for n in traced.nodes:
            self.where = n.name
            if n.op == "placeholder":
                env[n] = Ref(0) if n is placeholders[0] else n.args[0]
                continue
            get = lambda v: env[v]  # noqa: E731
            args, kwargs = fx.map_arg(n.args, get), fx.map_arg(n.kwargs, get)
            if n.op == "output":
                out = args[0]
                if not isinstance(out, Ref):
                    raise ValueError(
                        f"model: forward returns {type(out).__name__}, expected one tensor that depends on the input"
                    )
                return G.Graph(self.nodes, out.index)
            before = len(self.nodes)
            env[n] = self._node(n, args, kwargs, modules)
            value = env[n]
            if isinstance(value, Ref):
                if len(n.users) != 1:
                    self.single.discard(value.index)
                elif len(self.nodes) == before + 1:
                    self.single.add(before)
        raise ValueError("model: no output")

    def _node(self, n: Any, args: Any, kwargs: Any, modules: dict[str, Any]) -> Any:
        if n.op == "get_attr":
            value = self.model
            for part in n.target.split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor) and not n.target.startswith("_tensor_constant"):
                self.held.add(n)
            return value
        touched = any(isinstance(v, Ref) for v in _flat((args, tuple(kwargs.values()))))
        if not touched and (n.op == "call_module" or any(i in self.held for i in n.all_input_nodes)):
            self.baked = True
            self.held.add(n)
        if n.op == "call_module":
            m = modules[n.target]
            self.where = n.target
            if m._forward_hooks or m._forward_pre_hooks:
                raise self.fail(
                    type(m).__name__ + " with forward hooks", "; remove them, or use torch.nn.utils.parametrizations"
                )
            if not touched:
                return m(*args, **kwargs)
            handler = MODULES.get(type(m).forward)
            if handler is None:
                raise self.fail(type(m).__name__)
            return handler(self, m, args[0] if args else next(iter(kwargs.values())))
        if not touched:
            if n.op == "call_method":
                return getattr(args[0], n.target)(*args[1:], **kwargs)
            return n.target(*args, **kwargs)
        handler = (METHODS if n.op == "call_method" else FUNCTIONS).get(n.target)
        if handler is None:
            name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
            raise self.fail(f"{'method' if n.op == 'call_method' else 'function'} {name}")
        return handler(self, *args, **kwargs)


def _flat(v: Any) -> Iterator[Any]:
    if isinstance(v, (tuple, list)):
        for i in v:
            yield from _flat(i)
    elif isinstance(v, slice):
        yield from (v.start, v.stop, v.step)
    else:
        yield v


_CACHE: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple[Any, G.Graph]]] = weakref.WeakKeyDictionary()
_PLAIN = (int, float, str, bool, tuple, type(None))


_BAKED: dict[type, tuple[str, ...]] = {  # what a graph takes over from the common layers; others are compared in full
    nn.Sequential: (), nn.Linear: (), nn.ReLU: (), nn.Sigmoid: (), nn.Tanh: (), nn.Identity: (), nn.Flatten: ("start_dim", "end_dim"),
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
}  # fmt: skip


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes whenever a traced graph could: modules replaced, modes switched, plain attributes or hooks changed."""
    out: list[Any] = []
    left = [model]
    while left:
        m = left.pop()
        out.append(id(m))
        own, baked = m.__dict__, _BAKED.get(type(m))
        if baked is not None:
            out.extend([own.get(k) for k in baked])
        else:
            for k, v in own.items():
                if isinstance(v, _PLAIN):
                    out.append((k, v))
                elif isinstance(v, Tensor):
                    out.append(id(v))
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            out.append((len(own["_forward_hooks"]), len(own["_forward_pre_hooks"])))
        for held in ("_modules", "_parameters", "_buffers"):
            if own[held]:
                out.extend(map(id, own[held].values()))
        left.extend(child for child in own["_modules"].values() if child is not None)
    return tuple(out)


def first_parameter(model: nn.Module) -> Tensor | None:
    """``next(model.parameters(), None)``, without the generators that cost as much as a small kernel."""
    for p in model._parameters.values():
        if p is not None:
            return p
    for child in model._modules.values():
        found = None if child is None else first_parameter(child)
        if found is not None:
            return found
    return None


def traced_before(model: nn.Module) -> Any:
    """The chain (fastrobust.bounds.intervals) of the model as it was last traced, which may be out of date; False: not known."""
    hit = _CACHE.get(model, {}).get(False)
    return False if hit is None else hit[1].chain


def trace(model: nn.Module, shape: tuple[int, ...], exact: bool = False) -> G.Graph:
    """The graph of ``model`` for inputs of shape (B, *shape). ``exact``: layer by layer as the model computes (no normalisation
    folded into its convolution), with parameters in float64."""
    key = (shape, _fingerprint(model))
    held = _CACHE.setdefault(model, {})
    hit = held.get(exact)
    if hit is not None and hit[0] == key:
        return hit[1]
    if model._forward_hooks or model._forward_pre_hooks:
        raise unsupported(type(model).__name__ + " with forward hooks", "model")
    walk = _Walk(model, shape, not exact)
    built = walk.build()
    if exact:
        for node in built.nodes:
            if isinstance(node, (G.Dense, G.Conv, G.ConvTranspose)):
                node.get_weight, node.get_bias = _in_double(node.get_weight), _in_double(node.get_bias)
    if not walk.baked:
        held[exact] = (key, built)
    return built


def _in_double(get: G.Getter) -> G.Getter:
    def double() -> Tensor | None:
        t = get()
        return None if t is None else t.double()

    return double
