"""Models with their masks fixed: what an attack differentiates, forward and input gradient only."""

from __future__ import annotations

import collections
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from .._record import unwrapped
from . import _proof
from ._batches import SIZES, Family, batch_of, kind_of
from ._layers import Pool
from ._nodes import Unit
from ._observe import Call, assembled, observe
from ._program import Program, Steps
from ._region import Region
from ._snapshot import Snapshot
from .masked import update_masks

CHECKS = ("one", "all", "none")
# Shapes of inputs whose programs are kept.
REMEMBERED = 64

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._get_tracing_state
_autocast = torch._C._is_any_autocast_enabled


class _State:
    """The model as it was at one update, and the programs made of it."""

    def __init__(self, source: nn.Module, before: dict[Any, Family | None]) -> None:
        self.snapshot = Snapshot(source)
        self.families: dict[Any, Family | None] = {}
        self.before = before  # those of the last state
        self.seen: dict[Any, int] = {}
        self.pool = Pool(self.snapshot.layers, self.snapshot.owned)
        self.programs: collections.OrderedDict[Any, Program] = collections.OrderedDict()
        self.lock = threading.RLock()

    def program(self, key: Any, call: Call) -> Program:
        with self.lock:
            program = self.programs.get(key)
            if program is None:
                program = Program(self._steps(key, call), self.pool)
                self.programs[key] = program
                while len(self.programs) > REMEMBERED:
                    self.programs.popitem(last=False)
            return program

    def _steps(self, key: Any, call: Call) -> Steps:
        """From records of small batches where they tell what happens, else from one of this call."""
        n, kind = batch_of(call), kind_of(call, key)
        often = n > SIZES[0] or self.seen.setdefault(kind, n) != n or kind in self.before
        if n > 1 and kind not in self.families and often:
            old = self.before.pop(kind, None)
            self.families[kind] = None
            for make in ([old.renewed] if old is not None else []) + [Family.of]:
                try:
                    self.families[kind] = make(self.snapshot, call)
                    break
                except Exception:  # whatever the model says to other batches
                    continue
        family = self.families.get(kind)
        if family is not None and family.serves(n):
            return family.at(n)
        return observe(self.snapshot, call, call.tensors)


class FrozenModel(nn.Module):
    """See `freeze`. `update()` takes over the model's present scores, parameters, statistics and code paths."""

    source: nn.Module
    _state: _State

    def __init__(self, model: nn.Module, check: str = "one") -> None:
        super().__init__()
        if check not in CHECKS:
            raise ValueError(f"check: got {check!r}, expected one of {CHECKS}")
        # The model is read, never trained through here: it must not become a submodule.
        object.__setattr__(self, "source", model)
        self.check = check
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Take over the model as it is now. Gradients of forwards that ran before are still those of what ran."""
        source = unwrapped(self.source)
        with torch.inference_mode(False):
            update_masks(source)
            before = self._state.families if "_state" in self.__dict__ else {}
            self._state = _State(source, dict(before))

    def __getstate__(self) -> dict[str, Any]:
        # Programs and memory belong to this process; copies and pickles make their own.
        return {k: v for k, v in self.__dict__.items() if k != "_state"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.update()

    @property
    def regions(self) -> dict[int, Region]:
        """The regions of the programs made so far."""
        return dict(enumerate(self._state.pool.regions.values()))

    # ---- running ----

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or _dispatch_modes() or _functorch_level() is not None or _watched():
            if not _is_compiling() and _tracing() is not None:
                raise RuntimeError("model: got a frozen model for torch.jit.trace, expected the model itself")
            return self._state.snapshot.call(args, kwargs)  # ordinary torch code for whoever looks on
        if _autocast():
            args, kwargs = tree_map(_single_precision, (args, kwargs))
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return self._run(args, kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._state
        tensors: Any = args
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            x = args[0]
            if x.dtype != torch.float32:
                raise TypeError(f"x: expected float32, got {x.dtype}")
            key: Any = (x.shape, x.device)
        else:
            call = Call(args, kwargs)
            key, tensors = call.key(), call.tensors
        program = state.programs.get(key)
        if program is None:
            program = state.program(key, Call(args, kwargs))
        if program.proven and (program.differentiated or not torch.is_grad_enabled()):
            return assembled(program.outputs(tensors), program.work.spec)
        return self._proven(state.snapshot, program, Call(args, kwargs))

    def _proven(self, snapshot: Snapshot, program: Program, call: Call) -> Any:
        """A first run: its outputs, and its gradient when it comes, are compared with the model's."""
        tensors, every = call.tensors, self.check == "all"

        def itself(given: Any) -> Any:
            # Models may write into their input.
            return snapshot.plainly(*call.arguments([t.clone() for t in given]), tensors[0])

        gradient: _proof.GradientProof | None = None
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and tensors[0].shape[:1] != (0,)
        if self.check != "none" and wanted and not program.differentiated:

            def done() -> None:
                program.differentiated = True

            gradient = _proof.GradientProof(itself, tensors, done, every)
        # the inputs have no name here, which ``itself`` would hold on to
        leaves = program.outputs(tensors if gradient is None else gradient.inputs(tensors))
        if self.check == "none":
            program.proven = program.differentiated = True
        elif not program.proven:
            program.proven = _proof.outputs(itself, call.tensors, leaves, every)
        if gradient is not None:
            leaves = gradient.watch(leaves)
        return assembled(leaves, program.work.spec)

    # ---- words ----

    def paths(self, *sizes: tuple[int, ...]) -> list[dict[str, Any]]:
        """Per masked layer: name, weight, density, the path taken for inputs of `sizes` (of the first group of images),
        why, what is done in the same write ("then"), and the number of its region."""
        return [row for row in self._nodes(sizes)[0] if row["density"] is not None]

    def report(self, *sizes: tuple[int, ...]) -> str:
        """What becomes of every layer for inputs of `sizes`, and of what lies between them, as a table of text; and
        what ended each region, a stretch of the model that is run without leaving the compiled program."""
        rows, ends = self._nodes(sizes)
        lines = []
        for number, (end, groups) in enumerate(ends):
            for row in rows:
                if row["region"] != number:
                    continue
                shape, maps = "x".join(map(str, row["weight"])), "x".join(map(str, row["maps"]))
                density = "" if row["density"] is None else f"{100 * row['density']:6.2f} %"
                then = f"; then {row['then']}" if row["then"] else ""
                lines.append(
                    f"{row['layer']:<24} {shape:>14} {density:>8}  on {maps:>11}  {row['path']:<6}  "
                    f"{row['reason']}{then}"
                )
            lines.append(f"region {number + 1}, in groups of {groups} images, ends at {end}")
        return "\n".join(lines)

    @torch.no_grad()
    def _nodes(self, sizes: tuple[tuple[int, ...], ...]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
        """A row for each node of a program, and what ended its regions, with the sizes of the groups of images."""
        program, call = self._program_for(sizes)
        program.outputs(call.tensors)
        rows, ends = [], []
        for number, (region, end) in enumerate(zip(program.regions, program.ends, strict=True)):
            assert region.latest is not None
            for node, how in zip(region.nodes, region.latest.reads, strict=True):
                unit = node if isinstance(node, Unit) else None
                packed = unit.packed if unit is not None and unit.masked else None
                rows.append({
                    "layer": node.name,
                    "weight": unit.shape if unit is not None and unit.kind == "conv" else (),
                    "density": None if packed is None else packed.density,
                    "maps": (how.write.batch, how.read.channels, how.read.height, how.read.width),
                    "path": how.choice.path,
                    "reason": how.choice.reason,
                    "then": "" if unit is None else unit.then,
                    "region": number,
                })  # fmt: skip
            counts = collections.Counter(
                group.part.count for _, group in next(reversed(region.resolved.values())).groups
            )
            ends.append((end, " + ".join(f"{n} x {count}" if n > 1 else str(count) for count, n in counts.items())))
        return rows, ends

    def _program_for(self, sizes: tuple[tuple[int, ...], ...]) -> tuple[Program, Call]:
        state = self._state
        device = next((layer.packed.index.device for layer in state.pool.layers.values()), None)
        call = Call(tuple(torch.zeros(size, dtype=torch.float32, device=device) for size in sizes), {})
        key = (call.tensors[0].shape, call.tensors[0].device) if len(sizes) == 1 else call.key()
        return state.program(key, call), call


def _single_precision(v: Any) -> Any:
    """What autocast made half of a float32 tensor."""
    return v.float() if isinstance(v, Tensor) and v.dtype in (torch.float16, torch.bfloat16) else v


def _watched() -> bool:
    return _tracing() is not None or forward_ad._current_level >= 0


def freeze(model: nn.Module, *, check: str = "one") -> FrozenModel:
    """The model as an attack sees it: eval mode, masks computed once, differentiable in its input only.

    Masked convolutions with the batch normalisation, addition and ReLU that follow them become one write each, and stay
    in the fast layout from the first to the last; the input gradient visits the kept weights only. Layers for which
    torch's dense convolution is estimated to be faster take that (`FrozenModel.paths` says which and why). Everything
    else runs as ordinary torch operations. Outputs equal the model's in eval mode within float32 rounding.

    What the model does is recorded as it runs (flags, hooks, in-place changes, shapes), once for each shape of input.
    check: before the first outputs for a shape are returned, and at the first gradient, they are compared with the
    model's own on one example ("one") or "all" of the input that came; "none" trusts the record.

    The frozen model does not follow the model: call `update()` after an optimiser step or any other change. The authors
    attack in train mode, on batch statistics; that needs the model itself.

    Raises UnreadableModelError (a ValueError) at the first call for a model that no record stands for (branches on
    values of its input, random numbers), ModelMismatchError when the check fails, TypeError for inputs that are not
    float32.
    """
    return FrozenModel(model, check)
