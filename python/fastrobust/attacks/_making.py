"""How a victim is prepared: every way is made, compared with the model, and raced against it; the fastest stays."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import linecache
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import graph_module

from .._places import wave
from .._record import unwrapped, without_recording
from ..nn import freeze
from ..nn._snapshot import _patched, evaluating
from ..nn.freeze import FrozenModel
from ..nn.masked import masked_layers
from ..ops import _checks as ck
from ._changes import Marks, watchable
from ._compared import Unfit, apart, outputs_apart, race, step
from ._rewrite import Affine, Rewritten, can_fuse, fuse, in_place, norm_as_affine, rewrite

PAYS = 1.05  # times as fast as the model, or the model is run
EXACT = 1e-6  # of outputs and gradients in float64, relative to their norm
KINKS = 0.2  # of float32 gradients that agree in float64: ReLUs at zero up to rounding fall on either side
ALONE = 5e-3  # of gradients of models that do not run in float64
_CHECKED = 4  # images of the comparison

Call = Callable[[Tensor], Any]


@dataclasses.dataclass
class Preparation:
    """What became of a model. ``ratio``: its time for outputs and input gradient over the prepared one's, on ``batch``
    images; 1 where the model itself is run, and ``why`` says for what reason. Differences are the largest of outputs
    (relative to the largest output) and of input gradients (relative to their norm), as run and in float64 (None: the
    model does not run in it), each within its tolerance."""

    how: str = "the model itself"
    layout: str = ""
    why: str = ""
    folded: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    kernels: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    batch: int = 0
    ratio: float = 1.0
    seconds: float = 0.0
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    output_difference: float = 0.0
    output_tolerance: float = 0.0
    gradient_difference: float = 0.0
    gradient_tolerance: float = 0.0
    exact_difference: float | None = None

    @property
    def prepared(self) -> bool:
        """Whether something else than the model is run."""
        return self.how != "the model itself"

    def __str__(self) -> str:
        if not self.prepared:
            return f"the model itself is run: {self.why}"
        exact = "does not run in it" if self.exact_difference is None else f"{self.exact_difference:.1e}"
        lines = [
            f"{self.how}, {self.layout}: {self.ratio:.2f} times as fast as the model on {self.batch} images "
            f"(prepared in {self.seconds:.1f} s)",
            f"batch normalisations folded: {len(self.folded)}, kept as a factor and a shift: {len(self.kept)}",
            f"outputs differ by {self.output_difference:.1e} (allowed {self.output_tolerance:.0e}), input gradients by "
            f"{self.gradient_difference:.1e} (allowed {self.gradient_tolerance:.0e}), in float64: {exact} "
            f"(allowed {EXACT:.0e})",
            "tried: " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in self.ratios.items()),
        ]
        lines += [f"left out: {name}: {reason}" for name, reason in self.dropped.items()]
        return "\n".join([*lines, self.why] if self.why else lines)


@dataclasses.dataclass
class Recipe:
    """How a model was prepared, so that it can be done again after its weights have changed, without measuring."""

    level: str  # "written", "folded", "fused", "frozen"
    layout: torch.memory_format
    names: list[dict[str, str]] | None = None

    @property
    def title(self) -> str:
        return f"{self.level}, {_layout(self.layout)}"


@dataclasses.dataclass
class Built:
    """What is run in the model's place, for images of one shape; ``run`` None: the model itself."""

    run: Call | None
    recipe: Recipe | None
    marks: Marks | None
    example: Tensor
    report: Preparation

    def fits(self, x: Tensor) -> bool:
        like = self.example
        return x.shape[1:] == like.shape[1:] and x.dtype == like.dtype and x.device == like.device


def _layout(layout: torch.memory_format) -> str:
    return "channels last" if layout == torch.channels_last else "contiguous"


# ---- making ----


@contextlib.contextmanager
def _sources_forgotten() -> Iterator[None]:
    """torch.fx keeps the text of every graph that it compiles for ever, for the lines of tracebacks: twenty texts for
    each victim that is made."""
    before = set(linecache.cache)
    try:
        yield
    finally:
        kept = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
        for name in set(linecache.cache) - before:
            if name.startswith("<eval_with_key>"):
                linecache.cache.pop(name, None)
                kept.pop(name, None)


@contextlib.contextmanager
def _quietly(x: Tensor) -> Iterator[None]:
    """Outside of inference mode and autocast, with gradients on; the random state is what it was afterwards."""
    devices = [x.device] if x.is_cuda else []
    with (
        torch.random.fork_rng(devices=devices),
        without_recording(x),
        torch.inference_mode(False),
        torch.enable_grad(),
        _sources_forgotten(),
    ):
        yield


def build(source: Any, example: Tensor) -> Built:
    built = Built(None, None, None, example, Preparation(batch=len(example)))
    model, start = unwrapped(source), time.perf_counter()
    built.report.why = _refusal(model, example)
    if built.report.why:
        return built
    built.marks = Marks(model)
    with _quietly(example), evaluating(model):
        try:
            _choose(model, built)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the attack will say it again, where it is not the example's fault
            built.report.why = str(error) if isinstance(error, Unfit) else f"it fails on the example ({_line(error)})"
    if built.marks.settle(model):
        built.run, built.recipe, built.marks = None, None, None
        built.report = Preparation(batch=len(example), why="it writes its own parameters or buffers as it answers")
    built.report.seconds = time.perf_counter() - start
    return built


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _refusal(model: Any, example: Tensor) -> str:
    if not isinstance(model, nn.Module):
        return f"it is {ck.describe(model)}, not an nn.Module, whose parameters could be seen and watched"
    if isinstance(model, FrozenModel):
        return "it is frozen already"
    if isinstance(model, torch.jit.ScriptModule):
        return "it is a TorchScript module, which is compiled already"
    if not watchable(model):
        return "it has inference, quantised or sparse tensors, whose changes cannot be seen"
    if any(t.device != example.device for t in (*model.parameters(), *model.buffers())):
        return f"it has tensors on other devices than the example ({example.device})"
    if _patched(model):
        return "it has hooks or a patched forward, which a copy would not follow"
    return ""


def _choose(model: nn.Module, built: Built) -> None:
    """Every way is made, compared, and raced against the model; the fastest stays."""
    report, x = built.report, built.example
    judge = Judge(model, x)
    ways: list[tuple[Recipe, Call, Difference, Rewritten | None]] = []

    def offer(recipe: Recipe) -> None:
        try:
            run, found = made(model, x, recipe)
            ways.append((recipe, run, judge.differences(run, recipe), found))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code says to a copy, to fx, to another layout
            report.dropped[recipe.title] = str(error) if isinstance(error, Unfit) else _line(error)

    contiguous, last = torch.contiguous_format, torch.channels_last
    layouts = [contiguous, last] if x.dim() == 4 else [contiguous]
    if masked_layers(model) and x.dtype == torch.float32:
        offer(Recipe("frozen", contiguous))
    try:
        plain = _read(model, x)
    except Exception as error:  # fx has many words for it
        report.why = f"torch.fx cannot read it ({_line(error)}): its own code is run"
        for layout in layouts:
            offer(Recipe("written", layout))
    else:
        for layout in layouts:
            offer(Recipe("folded", layout))
        if x.dim() == 4 and can_fuse(plain):
            offer(Recipe("fused", last))
    if not ways:
        raise Unfit("; ".join([report.why, *report.dropped.values()]) if report.why else "; ".join(
            dict.fromkeys(report.dropped.values())))  # fmt: skip
    watch = built.marks
    assert watch is not None

    def watched(run: Call) -> Callable[[], Any]:
        return lambda: (watch.moved(), step(run, x))

    times = race({"": lambda: step(model, x), **{w[0].title: watched(w[1]) for w in ways}}, x)
    report.ratios = {title: times[""] / seconds for title, seconds in times.items() if title}
    best = max(ways, key=lambda w: report.ratios[w[0].title])
    recipe, run, difference, found = best
    report.ratio = report.ratios[recipe.title]
    if report.ratio < PAYS:
        words = f"it does not pay: {recipe.title} ran {report.ratio:.2f} times as fast"
        report.why, report.ratio = (f"{report.why}; {words}" if report.why else words), 1.0
        return
    built.run, built.recipe = run, recipe
    _describe(report, recipe, difference, found)


def _describe(report: Preparation, recipe: Recipe, difference: Difference, found: Rewritten | None) -> None:
    report.how, report.layout = _HOW[recipe.level], _layout(recipe.layout)
    if found is not None:
        report.folded, report.kept = found.folded, found.kept
    report.kernels = [(names["forward"], names["gradient"]) for names in recipe.names or ()]
    report.output_difference, report.output_tolerance = difference.outputs, difference.allowed
    report.gradient_difference, report.gradient_tolerance = difference.gradient, difference.allowed_gradient
    report.exact_difference = difference.exact


_HOW = {
    "written": "its own code with batch normalisation as a factor and a shift, parameters without gradients",
    "folded": "batch normalisation folded, activations in place",
    "fused": "batch normalisation folded, convolutions with reordered weights, sums and activations in their write",
    "frozen": "masked layers frozen",
}


def rebuilt(model: nn.Module, old: Built) -> Built:
    """The same way again for a model that has changed."""
    report = dataclasses.replace(old.report)
    built = dataclasses.replace(old, report=report, marks=None)
    why = _refusal(model, old.example)
    if why or old.recipe is None:
        built.run = None
        if why:
            built.recipe, report.how, report.why, report.ratio = None, Preparation.how, why, 1.0
            return built
    built.marks = Marks(model)
    if old.recipe is not None:
        with _quietly(old.example), evaluating(model):
            try:
                built.run, found = made(model, old.example, old.recipe)
                difference = Judge(model, old.example).differences(built.run, old.recipe)
                _describe(report, old.recipe, difference, found)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                built.run, built.recipe = None, None
                report.how, report.ratio, report.why = Preparation.how, 1.0, f"it has changed: {_line(error)}"
        built.marks.settle(model)
    return built


def _copy(model: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # tensors with a history, locks, files
        raise Unfit(f"it does not let itself be copied ({_line(error)})") from error
    known = {id(m) for m in model.modules()}
    if any(id(m) in known for m in copied.modules()):
        raise Unfit("its copy has modules of its own")
    for module in copied.modules():
        module.training = False
    for p in copied.parameters():
        p.requires_grad_(False)
    return copied


def _read(model: nn.Module, x: Tensor) -> Rewritten:
    two = x[:2] if len(x) > 1 else x.repeat(2, *[1] * (x.dim() - 1))  # what is there once for all images shows
    return rewrite(_copy(model), two)


def made(model: nn.Module, x: Tensor, recipe: Recipe) -> tuple[Call, Rewritten | None]:
    """What is run in the model's place by a recipe, whose kernels are chosen where it names none."""
    if recipe.level == "frozen":
        return freeze(_copy(model)), None
    found: Rewritten | None = None
    network: nn.Module
    if recipe.level == "written":
        network = _copy(model)
        for module in network.modules():
            sides = norm_as_affine(module)
            if sides is not None:
                dtype = next(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()).dtype
                object.__setattr__(module, "forward", Affine(sides[0].to(dtype), sides[1].to(dtype)))
    else:
        found = _read(model, x)
        network = found.graph
        if recipe.level == "fused":
            layers = fuse(found, len(x), recipe.names)
            recipe.names = [layer.kernels for layer in layers]
        else:
            in_place(found.graph)
    network.to(memory_format=recipe.layout)  # type: ignore[call-overload]  # missing from torch's stubs
    call: Call = lambda x: network(x.contiguous(memory_format=recipe.layout))
    if recipe.level == "written":
        call = _or_itself(call, model)
    return call, found


def _or_itself(call: Call, model: nn.Module) -> Call:
    """A model's own code may view what has another layout now, in a branch that no comparison has seen."""
    owner = weakref.ref(model)

    def run(x: Tensor) -> Any:
        try:
            return call(x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            model = owner()
            if model is None:
                raise
            with evaluating(model):
                return model(x)

    return run


# ---- comparing ----


@dataclasses.dataclass
class Difference:
    outputs: float
    allowed: float
    gradient: float
    allowed_gradient: float
    exact: float | None


class Judge:
    """The model's own outputs and gradients, for the images and in float64 for images near them, away from ties."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x[:_CHECKED]
        self.want = step(model, self.x)
        if any(not torch.equal(a, b) for a, b in zip(self.want[0], step(model, self.x)[0], strict=True)):
            raise Unfit("it gives other outputs for the same images")
        self.double: nn.Module | None = None
        self.exactly: tuple[list[Tensor], Tensor] | None = None
        self.exact: dict[str, float] = {}
        far = 1e-3 * self.x.double().abs().amax().clamp_min(1e-3)
        self.near = self.x[:2].double() + far * wave(self.x[:2].double())
        with contextlib.suppress(Exception):  # models that convert by themselves, layers without float64
            self.double = _copy(model).double()
            self.exactly = step(self.double, self.near)

    def differences(self, run: Call, recipe: Recipe) -> Difference:
        outputs, gradient = step(run, self.x)
        dtype = self.x.dtype
        allowed = 1e-9 if dtype == torch.float64 else max(1e-3, 32 * torch.finfo(dtype).eps)
        gap = outputs_apart(outputs, self.want[0])
        if not gap <= allowed:
            raise Unfit(f"its outputs differ by {gap:.1e}, rounding explains {allowed:.0e}")
        exact = self._exact(recipe)
        if exact is not None and not exact <= EXACT:
            raise Unfit(f"it differs by {exact:.1e} in float64")
        kinks = ALONE if exact is None else KINKS
        if dtype in (torch.float16, torch.bfloat16):
            kinks = max(kinks, 1.0 if exact is not None else 0.2)
        turned = apart(gradient, self.want[1])
        if len(self.x) > 1:  # a kernel may be another for one image
            (alone, alone_gradient), want = step(run, self.x[:1]), step(self.model, self.x[:1])
            if not outputs_apart(alone, want[0]) <= allowed:
                raise Unfit("its outputs for one image alone differ")
            turned = max(turned, apart(alone_gradient, want[1]))
        if not turned <= kinks:
            raise Unfit(f"its input gradients differ by {turned:.1e}, rounding explains {kinks:.0e}")
        return Difference(gap, allowed, turned, kinks, exact)

    def _exact(self, recipe: Recipe) -> float | None:
        """How far the same way is in float64, where no rounding hides what it computes."""
        if self.double is None or self.exactly is None or recipe.level == "frozen":
            return None
        if recipe.level not in self.exact:
            run, _ = made(self.double, self.near, Recipe(recipe.level, torch.contiguous_format))
            outputs, gradient = step(run, self.near)
            self.exact[recipe.level] = max(outputs_apart(outputs, self.exactly[0]), apart(gradient, self.exactly[1]))
        return self.exact[recipe.level]
