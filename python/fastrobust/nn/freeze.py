"""Models with their masks fixed: what an attack differentiates, forward and input gradient only."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops import _conv_cost as cost
from ..ops import binary as ops
from ..ops._dense_conv import dense_weight, in_full_precision
from ..ops._library import nothing_intercepts
from ._region import Region, Unit
from .masked import BinaryMaskedConv2d, BinaryMaskedLinear, MaskedLayer, update_masks

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELU = (torch.relu, F.relu, torch.relu_, "relu", "relu_")


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, MaskedLayer) or super().is_leaf_module(m, qualified_name)


def is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    return isinstance(module, nn.ReLU) or (node.op in ("call_function", "call_method") and node.target in _RELU)


class _RunRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: Region, *inputs: Tensor) -> tuple[Tensor, ...]:
        keep = any(ctx.needs_input_grad[1:])
        outs, saved = region.forward([x.resolve_neg() for x in inputs], keep)
        ctx.region, ctx.saved, ctx.sizes = region, saved, [x.shape for x in inputs]
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads):
            return None, *([None] * len(ctx.sizes))
        given = [None if g is None else g.contiguous() for g in grads]
        return None, *ctx.region.backward(given, ctx.saved, ctx.sizes)


class _UnitNodes:
    """The nodes of the traced graph that one unit stands for."""

    def __init__(self, conv: fx.Node) -> None:
        self.conv = self.last = conv
        self.norm: fx.Node | None = None
        self.add: fx.Node | None = None
        self.residual: fx.Node | None = None
        self.relu = False


class FrozenModel(nn.Module):
    """See `freeze`. `update()` takes over the model's present scores and batch statistics."""

    source: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # The model is read, never trained through here: it must not become a submodule.
        object.__setattr__(self, "source", model)
        try:
            self.graph = Tracer().trace(model)
        except Exception as error:
            raise ValueError(
                f"model: expected one that torch.fx can trace, got {type(model).__name__}: {error}"
            ) from error
        self.modules_by_name = dict(model.named_modules())
        self._drop_identities()
        self.norms = self._fold_norms()
        self.unit_nodes = self._find_units()
        self.steps = self._schedule()
        self.update()

    # ---- the graph ----

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules_by_name[str(node.target)] if node.op == "call_module" else None

    def _drop_identities(self) -> None:
        """What does nothing in eval mode must not take maps out of the fast layout."""
        for node in list(self.graph.nodes):
            if isinstance(self._module(node), (nn.Identity, nn.Dropout, nn.Dropout2d)) and len(node.args) == 1:
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _fold_norms(self) -> dict[str, nn.Module]:
        """Batch normalisations that follow a masked linear layer, by its name: part of its scale and shift."""
        folded: dict[str, nn.Module] = {}
        for node in list(self.graph.nodes):
            layer = self._module(node)
            if not isinstance(layer, BinaryMaskedLinear) or len(node.users) != 1:
                continue
            user = next(iter(node.users))
            norm = self._module(user)
            # A layer that is called twice may be normalised once.
            calls = sum(n.op == "call_module" and n.target == node.target for n in self.graph.nodes)
            if not isinstance(norm, nn.BatchNorm1d) or norm.running_mean is None or calls != 1:
                continue
            if norm.num_features == layer.scores.shape[0]:
                folded[str(node.target)] = norm
                user.replace_all_uses_with(node)
                self.graph.erase_node(user)
        return folded

    def _find_units(self) -> dict[fx.Node, _UnitNodes]:
        """Units by their last node: convolution, then batch normalisation, addition and ReLU where they follow."""
        units: dict[fx.Node, _UnitNodes] = {}
        taken: set[fx.Node] = set()
        for node in self.graph.nodes:
            if not isinstance(self._module(node), BinaryMaskedConv2d):
                continue
            unit = _UnitNodes(node)
            while len(unit.last.users) == 1:
                user = next(iter(unit.last.users))
                if user in taken or not self._extend(unit, user):
                    break
                taken.add(user)
                unit.last = user
            units[unit.last] = unit
        return units

    def _extend(self, unit: _UnitNodes, user: fx.Node) -> bool:
        module = self._module(user)
        if isinstance(module, nn.BatchNorm2d):
            if unit.norm is not None or unit.add is not None or unit.relu:
                return False
            # Batch statistics are data: only running ones can be folded.
            if module.running_mean is None:
                return False
            unit.norm = user
            return True
        if user.op in ("call_function", "call_method") and user.target in _ADD:
            operands = [a for a in user.args if isinstance(a, fx.Node)]
            if unit.add is not None or unit.relu or len(operands) != 2 or user.kwargs or operands[0] is operands[1]:
                return False
            unit.add = user
            unit.residual = operands[1] if operands[0] is unit.last else operands[0]
            return True
        if is_relu(user, module):
            if unit.relu:
                return False
            unit.relu = True
            return True
        return False

    def _schedule(self) -> list[tuple[str, Any]]:
        """("plain", node) and ("region", (unit nodes, input nodes, output nodes)) in execution order."""
        inside = {n for u in self.unit_nodes.values() for n in (u.conv, u.norm, u.add, u.last) if n is not None}
        steps: list[tuple[str, Any]] = []
        group: list[_UnitNodes] = []

        def close() -> None:
            if not group:
                return
            made = {u.last for u in group}
            used = [n for u in group for n in (u.conv.args[0], u.residual) if isinstance(n, fx.Node)]
            inputs = list(dict.fromkeys(n for n in used if n not in made))
            own = {n for u in group for n in (u.conv, u.add)}
            outputs = [u.last for u in group if any(user not in own for user in u.last.users)]
            steps.append(("region", (list(group), inputs, outputs)))
            group.clear()

        for node in self.graph.nodes:
            if node in self.unit_nodes:
                group.append(self.unit_nodes[node])
            elif node not in inside:
                made = {u.last for u in group}
                if any(a in made for a in node.all_input_nodes):
                    close()
                steps.append(("plain", node))
        close()
        return steps

    # ---- what is frozen ----

    @torch.no_grad()
    def update(self) -> None:
        """Take over the masks, signs and batch statistics the model has now."""
        update_masks(self.source)
        self.plain: dict[str, Callable[[Tensor], Tensor]] = {}
        self.regions: dict[int, Region] = {}
        for at, (kind, step) in enumerate(self.steps):
            if kind == "plain":
                module = self._module(step)
                if module is not None:
                    self.plain[str(step.target)] = _frozen_module(module, self.norms.get(str(step.target)))
                continue
            nodes, inputs, outputs = step
            number = {n: -1 - i for i, n in enumerate(inputs)} | {u.last: i for i, u in enumerate(nodes)}
            units = [self._unit(u, number) for u in nodes]
            # A forward that still wants its gradient keeps the region it ran in.
            self.regions[at] = Region(units, len(inputs), [number[n] for n in outputs])

    def _unit(self, nodes: _UnitNodes, number: dict[fx.Node, int]) -> Unit:
        layer = self.modules_by_name[str(nodes.conv.target)]
        assert isinstance(layer, BinaryMaskedConv2d)
        scale, shift = layer.channel_scale(), None if layer.bias is None else layer.bias.detach().clone()
        if nodes.norm is not None:
            alpha, beta = norm_affine(self._module(nodes.norm))
            shift = beta if shift is None else shift * alpha + beta
            scale = alpha if scale is None else scale * alpha
        source = nodes.conv.args[0]
        assert isinstance(source, fx.Node)
        residual = None if nodes.residual is None else number[nodes.residual]
        return Unit(
            str(nodes.conv.target), number[source], layer.packed(), layer.geometry(), scale, shift, residual, nodes.relu
        )

    # ---- running ----

    def forward(self, *inputs: Tensor) -> Any:
        inputs = tuple(ops.as_operand(x) for x in inputs)
        for x in inputs:
            if x.dtype != torch.float32:
                raise TypeError(f"x: expected float32, got {x.dtype}")
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for at, (kind, step) in enumerate(self.steps):
            if kind == "region":
                _, sources, outputs = step
                region = self.regions[at]
                xs = [self._checked(region, i, values[n]) for i, n in enumerate(sources)]
                if nothing_intercepts() and not (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
                    outs, _ = region.forward([x.resolve_neg() for x in xs], False)
                else:
                    outs = _RunRegion.apply(region, *xs)
                values.update(zip(outputs, outs, strict=True))
                continue
            node: fx.Node = step
            if node.op == "placeholder":
                values[node] = next(given)
                continue
            args: Any = fx.map_arg(node.args, lambda n: values[n])
            kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n])
            if node.op == "output":
                return args[0]
            if node.op == "call_module":
                values[node] = self.plain[str(node.target)](*args, **kwargs)
            elif node.op == "call_function":
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = operator.attrgetter(str(node.target))(self.source).detach()
        raise AssertionError("the graph has no output")

    @staticmethod
    def _checked(region: Region, i: int, x: Tensor) -> Tensor:
        x = ops.as_operand(x)
        unit = next((u for u in region.units if u.source == -1 - i), None)
        channels = None if unit is None else unit.shape[1] * unit.geometry.groups
        if x.dim() != 4 or (channels is not None and x.shape[1] != channels):
            raise ValueError(f"x: expected (N, {channels}, H, W), got {tuple(x.shape)}")
        ops.check_operand(x, region.units[0].packed)
        return x

    def paths(self, *sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        """Per masked layer: name, weight, density, the path taken for inputs of `sizes`, and why."""
        device = next((r.units[0].packed.index.device for r in self.regions.values()), None)
        with torch.no_grad():
            self(*[torch.zeros(size, dtype=torch.float32, device=device) for size in sizes])
        rows: list[dict[str, Any]] = []
        for region in self.regions.values():
            assert region.latest is not None
            rows += [
                _row(u.name, u.packed.shape, u.packed.density, r.choice, (r.read.batch, r.read.height, r.read.width))
                for u, r in zip(region.units, region.latest.reads, strict=True)
            ]
        for name, layer in self.modules_by_name.items():
            if isinstance(layer, BinaryMaskedLinear):
                packed, batch = layer.packed(), sizes[0][0]
                choice = ops.path_of(packed, batch, 1, 1, layer.geometry())
                rows.append(_row(name, packed.shape, packed.density, choice, (batch, 1, 1)))
        return rows

    def report(self, *sizes: tuple[int, ...]) -> str:
        """`paths` as a table of text."""
        lines = []
        for row in self.paths(*sizes):
            shape, maps = "x".join(map(str, row["weight"])), "x".join(map(str, row["maps"]))
            lines.append(
                f"{row['layer']:<24} {shape:>14} {100 * row['density']:6.2f} %  on {maps:>9}  {row['path']:<6}  {row['reason']}"
            )
        return "\n".join(lines)


def _row(
    name: str, shape: tuple[int, ...], density: float, choice: cost.Choice, maps: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "layer": name,
        "weight": shape,
        "density": density,
        "maps": maps,
        "path": choice.path,
        "reason": choice.reason,
    }


def norm_affine(module: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Eval-mode batch normalisation as x alpha + beta."""
    assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
    assert module.running_mean is not None and module.running_var is not None
    alpha = torch.rsqrt(module.running_var + module.eps)
    if module.weight is not None:
        alpha = alpha * module.weight
    beta = -module.running_mean * alpha
    if module.bias is not None:
        beta = beta + module.bias
    return alpha.detach(), beta.detach()


class _FrozenLinear:
    """A masked linear layer with the batch normalisation that follows it, if any."""

    def __init__(self, layer: BinaryMaskedLinear, norm: nn.Module | None) -> None:
        self.packed, self.geometry = layer.packed(), layer.geometry()
        self.scale, self.shift = layer.channel_scale(), None if layer.bias is None else layer.bias.detach().clone()
        # Of rows of images the normalisation is that of the outputs; of anything else it is its own affair.
        self.norm = None if norm is None else copy.deepcopy(norm).eval().requires_grad_(False)
        self.folded = self.scale, self.shift
        if norm is not None:
            alpha, beta = norm_affine(norm)
            self.folded = (
                alpha if self.scale is None else self.scale * alpha,
                beta if self.shift is None else self.shift * alpha + beta,
            )
        weight = dense_weight(self.packed, torch.float32, torch.contiguous_format).flatten(1)
        self.weight = weight if self.folded[0] is None else weight * self.folded[0][:, None]

    def __call__(self, x: Tensor) -> Tensor:
        x = ops.as_operand(x)
        if x.dim() != 2:
            y = ops.masked_linear(x, self.packed, None, scale=self.scale, shift=self.shift)
            return y if self.norm is None else self.norm(y)
        scale, shift = self.folded
        fits = x.dtype == torch.float32 and x.shape[1] == self.packed.shape[1] and x.device == self.weight.device
        if fits and ops.path_of(self.packed, x.shape[0], 1, 1, self.geometry).path == "dense":
            with in_full_precision(x):
                return F.linear(x, self.weight, shift)
        return ops.masked_linear(x, self.packed, None, scale=scale, shift=shift)


def _frozen_module(module: nn.Module, norm: nn.Module | None = None) -> Callable[..., Any]:
    """A module of the plain part as it is in eval mode, its parameters fixed; `norm` follows it."""
    if isinstance(module, BinaryMaskedLinear):
        return _FrozenLinear(module, norm)
    if isinstance(module, MaskedLayer) or any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return copy.deepcopy(module).eval().requires_grad_(False)
    return module if not module.training else copy.copy(module).eval()


def freeze(model: nn.Module) -> FrozenModel:
    """The model as an attack sees it: eval mode, masks computed once, differentiable in its input only.

    Masked convolutions with the batch normalisation, addition and ReLU that follow them become one write each, and stay
    in the fast layout from the first to the last; the input gradient visits the kept weights only. Layers for which
    torch's dense convolution is estimated to be faster take that (`FrozenModel.paths` says which and why). Everything
    else runs as ordinary torch code. Outputs equal the model's in eval mode within float32 rounding.

    The frozen model does not follow the model: call `update()` after an optimiser step. The authors attack in train
    mode, on batch statistics; that needs the model itself.

    model: traceable by torch.fx, float32, its masked layers made by `convert`. Raises ValueError when it is not.
    """
    return FrozenModel(model)
