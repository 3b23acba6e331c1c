"""Victims made ready for thousands of passes: only the input has a gradient, and nothing is computed that can be known."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._places import wave
from .._record import unwrapped, without_recording
from ..nn import freeze
from ..nn._snapshot import _patched, evaluating
from ..nn.freeze import FrozenModel, _autocast, _dispatch_modes, _functorch_level, _is_compiling, _watched
from ..nn.masked import masked_layers
from ..ops import _checks as ck
from ._changes import Marks, watchable
from ._compared import Unfit, apart, outputs_apart, race, step
from ._modes import owner
from ._rewrite import Affine, Rewritten, can_fuse, fuse, in_place, norm_as_affine, rewrite

PAYS = 1.05  # times as fast as the model, or the model is run
EXACT = 1e-6  # of outputs and gradients in float64, relative to their norm
KINKS = 0.2  # of float32 gradients that agree in float64: ReLUs at zero up to rounding fall on either side
ALONE = 5e-3  # of gradients of models that do not run in float64
ROWS = 16  # images that ``prepare=True`` measures on
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
class _Recipe:
    """How a model was prepared, so that it can be done again after its weights have changed, without measuring."""

    level: str  # "written", "folded", "fused", "frozen"
    layout: torch.memory_format
    names: list[dict[str, str]] | None = None

    @property
    def title(self) -> str:
        return f"{self.level}, {_layout(self.layout)}"


@dataclasses.dataclass
class _Built:
    """What is run in the model's place, for images of one shape; ``run`` None: the model itself."""

    run: Call | None
    recipe: _Recipe | None
    marks: Marks | None
    example: Tensor
    report: Preparation

    def fits(self, x: Tensor) -> bool:
        like = self.example
        return x.shape[1:] == like.shape[1:] and x.dtype == like.dtype and x.device == like.device


class PreparedVictim(nn.Module):
    """See :func:`prepare`. ``report`` says what became of the model; ``refresh()`` looks at once whether it has changed."""

    built: _Built
    source: Any

    def __init__(self, model: Any, built: _Built) -> None:
        super().__init__()
        kept = owner(model)
        if isinstance(kept, nn.Module):
            self.model = kept  # for its dtype, device and modes; it is never changed through here
            self.training = False
        object.__setattr__(self, "source", model)
        object.__setattr__(self, "built", built)
        self.generation = 0  # how often the weights were taken over

    @property
    def report(self) -> Preparation:
        return self.built.report

    def forward(self, x: Tensor) -> Any:
        built = self.built
        run = built.run
        if run is None or not built.fits(x) or not len(x) or _looked_on() or _autocast():
            return self._itself(x)
        if built.marks is not None and built.marks.moved():
            self.refresh()
            run = self.built.run
        return self._itself(x) if run is None else run(x)

    def _itself(self, x: Tensor) -> Any:
        model = owner(self.source)
        if isinstance(model, nn.Module) and any(m.training for m in model.modules()):
            with evaluating(model):
                return self.source(x)
        return self.source(x)

    def refresh(self) -> bool:
        """Whether the model has changed since it was prepared; if so it is prepared again, in the same way, and compared
        again. Every attack asks at its start."""
        built = self.built
        if built.marks is None or not built.marks.differs(unwrapped(self.source)):
            return False
        object.__setattr__(self, "built", _rebuilt(unwrapped(self.source), built))
        self.generation += 1
        return True

    def __getstate__(self) -> dict[str, Any]:
        # what is run belongs to this process and to this model; copies and pickles make their own
        return {k: v for k, v in self.__dict__.items() if k != "built"} | {"made_of": self.built.example}

    def __setstate__(self, state: dict[str, Any]) -> None:
        example = state.pop("made_of")
        self.__dict__.update(state)
        object.__setattr__(self, "built", _build(self.source, example))

    def train(self, mode: bool = True) -> PreparedVictim:
        """Does nothing: eval mode is what was prepared, and the model's own modes are not changed through here."""
        return self

    def extra_repr(self) -> str:
        return str(self.report).splitlines()[0]


def prepare(model: Call, example: Tensor) -> PreparedVictim:
    """The model made ready for thousands of passes of which only the input's gradient is wanted: a module that every
    attack takes in its place.

    Batch normalisation joins the layer before it, or the one behind it where no padding lies between (through residual
    graphs, which torch.fx reads), and else becomes one factor and shift with the ReLU behind it. Additions and clamps
    happen in the write of the convolution before them. Weights are reordered once, and no parameter has a gradient. The
    layout of maps and the kernels of each layer are chosen by measurement on ``example``. A model that torch.fx cannot
    read keeps its own code: normalisations, parameters and layout are prepared. Masked layers are frozen
    (:func:`fastrobust.nn.freeze`). Where nothing is at least 1.05 times as fast as the model, the model is run.

    Every way is compared with the model in eval mode before it is taken, on images of the example: outputs and input
    gradients as they are and in float64, within what ``report`` states. Images of another shape, dtype or device than
    the example's go to the model itself, as do calls under autocast, torch.compile, functorch and dispatch modes.
    Derivatives of second order need the model itself.

    The model is not changed. When it is, what is run follows: writes that torch counts are seen in every pass, others
    (through ``.data``, numpy, attributes) at the start of every attack and by ``refresh()``. It is then prepared again in
    the same way; nothing is measured anew.

    Args:
        model: an nn.Module (in any mode: its eval mode is prepared). Any other callable is run as it is.
        example: (B, ...) images as the model is given them (after ``normalize``), best as many as a batch of the attack.

    Returns:
        A module; ``print(victim.report)`` says what was done, how fast it is and how far from the model.

    Raises:
        TypeError, ValueError: for a model that is no callable, or an example that is no batch of floating-point images.
    """
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model: got {ck.describe(model)}, expected an nn.Module or a callable")
    if not isinstance(example, Tensor) or not example.is_floating_point():
        raise TypeError(f"example: got {ck.describe(example)}, expected a tensor of floating-point images")
    if example.dim() < 2 or not example.numel():
        raise ValueError(f"example: got shape {tuple(example.shape)}, expected (B, ...) with at least one image")
    if isinstance(model, PreparedVictim):
        model = model.source
    return PreparedVictim(model, _build(model, example.detach().clone()))


_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Built]] = weakref.WeakKeyDictionary()


def prepared_once(model: Any, x: Tensor) -> PreparedVictim:
    """For ``prepare=True``: measured on the first images of x, and remembered with the model."""
    if isinstance(model, PreparedVictim):
        return model
    key = (x.shape[1:], x.dtype, x.device)
    known = _kept.setdefault(model, {}) if isinstance(model, nn.Module) else {}
    if key not in known:
        known[key] = _build(model, x[:ROWS].detach().clone())
    victim = PreparedVictim(model, known[key])
    if victim.refresh():
        known[key] = victim.built
    return victim


def _looked_on() -> bool:
    return bool(_is_compiling() or _dispatch_modes() or _functorch_level() is not None or _watched())


def _layout(layout: torch.memory_format) -> str:
    return "channels last" if layout == torch.channels_last else "contiguous"


# ---- making ----


@contextlib.contextmanager
def _quietly(x: Tensor) -> Iterator[None]:
    """Outside of inference mode and autocast, with gradients on; the random state is what it was afterwards."""
    devices = [x.device] if x.is_cuda else []
    with (
        torch.random.fork_rng(devices=devices),
        without_recording(x),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def _build(source: Any, example: Tensor) -> _Built:
    built = _Built(None, None, None, example, Preparation(batch=len(example)))
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


def _choose(model: nn.Module, built: _Built) -> None:
    """Every way is made, compared, and raced against the model; the fastest stays."""
    report, x = built.report, built.example
    judge = _Judge(model, x)
    ways: list[tuple[_Recipe, Call, _Difference, Rewritten | None]] = []

    def offer(recipe: _Recipe) -> None:
        try:
            run, found = _made(model, x, recipe)
            ways.append((recipe, run, judge.differences(run, recipe), found))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's code says to a copy, to fx, to another layout
            report.dropped[recipe.title] = str(error) if isinstance(error, Unfit) else _line(error)

    contiguous, last = torch.contiguous_format, torch.channels_last
    layouts = [contiguous, last] if x.dim() == 4 else [contiguous]
    if masked_layers(model) and x.dtype == torch.float32:
        offer(_Recipe("frozen", contiguous))
    try:
        plain = _read(model, x)
    except Exception as error:  # fx has many words for it
        report.why = f"torch.fx cannot read it ({_line(error)}): its own code is run"
        for layout in layouts:
            offer(_Recipe("written", layout))
    else:
        for layout in layouts:
            offer(_Recipe("folded", layout))
        if x.dim() == 4 and can_fuse(plain):
            offer(_Recipe("fused", last))
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


def _describe(report: Preparation, recipe: _Recipe, difference: _Difference, found: Rewritten | None) -> None:
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


def _rebuilt(model: nn.Module, old: _Built) -> _Built:
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
                built.run, found = _made(model, old.example, old.recipe)
                difference = _Judge(model, old.example).differences(built.run, old.recipe)
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


def _made(model: nn.Module, x: Tensor, recipe: _Recipe) -> tuple[Call, Rewritten | None]:
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
class _Difference:
    outputs: float
    allowed: float
    gradient: float
    allowed_gradient: float
    exact: float | None


class _Judge:
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

    def differences(self, run: Call, recipe: _Recipe) -> _Difference:
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
        return _Difference(gap, allowed, turned, kinks, exact)

    def _exact(self, recipe: _Recipe) -> float | None:
        """How far the same way is in float64, where no rounding hides what it computes."""
        if self.double is None or self.exactly is None or recipe.level == "frozen":
            return None
        if recipe.level not in self.exact:
            run, _ = _made(self.double, self.near, _Recipe(recipe.level, torch.contiguous_format))
            outputs, gradient = step(run, self.near)
            self.exact[recipe.level] = max(outputs_apart(outputs, self.exactly[0]), apart(gradient, self.exactly[1]))
        return self.exact[recipe.level]
