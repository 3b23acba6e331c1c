"""AutoAttack: several attacks one after the other, each on what the ones before have left (Croce & Hein 2020)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._eager import left_to_python
from ..bounds import SlopeSearch, compute_bounds
from ..ops import _checks as ck
from . import _inputs, _state, _trust
from ._model import Output, Victim, undisturbed, usable
from ._objective import Objective
from ._options import Clip, Integer, Model, Norm, Suite, Values, Version
from ._rank import malt_targets
from ._report import AttackReport, EvaluationReport
from ._run import Run, runs_of_now
from ._state import Progress
from ._task import Task, read
from ._versions import Planned, fit_to_classes, planned
from .apgd import apgd
from .fab import fab
from .square import square

if TYPE_CHECKING:
    from typing_extensions import Unpack

_ATTACKS: dict[str, Any] = {"apgd": apgd, "fab": fab, "square": square}
# for certify_first: on every example, and on those that the first attack did not break
_QUICK, _TIGHT = "crown-ibp", "alpha-crown"
# about as long as CROWN takes; a search for hidden neurons, too, takes longer than the attacks in deep networks
_SEARCH = SlopeSearch(iterations=10, stop=0.0, hidden=0)
_NORM_NAMES = {math.inf: "Linf", 2.0: "L2", 1.0: "L1"}


class EvaluationResult(NamedTuple):
    """``adv`` (B, ...): x itself where nothing was found; ``fooled`` (B,) bool, those wrong already included."""

    adv: Tensor
    fooled: Tensor
    report: EvaluationReport


@overload
def autoattack(
    model: Model, x: Tensor, y: Tensor, *, eps: Values, return_details: Literal[False] = False, **options: Unpack[Suite]
) -> Tensor: ...
@overload
def autoattack(
    model: Model, x: Tensor, y: Tensor, *, eps: Values, return_details: Literal[True], **options: Unpack[Suite]
) -> EvaluationResult: ...
@overload
def autoattack(
    model: Model, x: Tensor, y: Tensor, *, eps: Values, return_details: bool, **options: Unpack[Suite]
) -> Tensor | EvaluationResult: ...
@left_to_python
def autoattack(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Values,
    norm: Norm = math.inf,
    version: Version = "standard",
    certify_first: bool | str = False,
    batch_size: Integer = 250,
    seed: Integer = 0,
    first_example: Any = 0,
    state: str | os.PathLike[str] | None = None,
    clip: Clip | None = (0.0, 1.0),
    normalize: tuple[Any, Any] | None = None,
    autocast: torch.dtype | None = None,
    output: Output | None = None,
    model_mode: Literal["eval", "keep"] = "eval",
    mask: Any = None,
    tolerance: float = 0.0,
    progress: bool = False,
    check: bool = True,
    prepare: bool = False,
    return_details: bool = False,
) -> Tensor | EvaluationResult:
    """The robust accuracy that is left after several attacks, as papers report it.

    Each attack gets the examples that are still classified rightly; an example leaves an attack as soon as it is
    fooled, and the verdict on it is the model's on the point that is handed back (for version "rand" on the mean of its
    outputs).

    Args:
        model, x, y, eps, norm, clip, normalize, autocast, output, model_mode, mask, tolerance: as in :func:`pgd`.
        version: "standard": APGD on cross-entropy, targeted APGD on the DLR loss, targeted FAB (nine targets each) and
            Square (5000 queries); norm 1 has 5 restarts, 5 targets and larger radii first. "plus": untargeted APGD-DLR
            and FAB too, with 5 restarts. "rand": APGD on both losses, 20 samples a step, for randomised models. "fast":
            50 steps of APGD on cross-entropy, then targeted APGD on the 3 classes that are nearest by MALT's order
            (logit gap over the dual norm of the gradient difference): about a fifth of the backward passes, without FAB
            and Square. Or a list of "apgd-ce", "apgd-dlr", "apgd-t", "apgd-malt", "fab", "fab-t", "square", each a name
            or (name, options of the attack).
        certify_first: examples that bounds prove robust skip every attack (a method of ``compute_bounds``; True:
            "crown-ibp", and what the first attack leaves is tried with tighter bounds before the long ones). A model
            that bounds cannot read is attacked as usual, with a warning.
        batch_size: examples attacked at once. Random numbers go by an example's number in x, not by its batch.
        seed: of all random numbers.
        first_example: the number of x[0] in the data set, or (B,) numbers: a part of a set, evaluated by itself, then
            gets the random numbers that it has in the whole. :meth:`EvaluationReport.of_parts` joins the reports.
        state: path of a file that is written after every batch. Where it exists the evaluation is taken up from it, and
            ends with the same bits; a file of another model, other data or settings is refused.
        progress: a bar over the examples of each attack.
        check: check the values of x and y, and warn (:class:`AttackWarning`) of what makes the result doubtful:
            randomised outputs, softmax, zero gradients, an accuracy near chance, Square better than the other attacks,
            a model that changes or optimises as it answers, or whose answers depend on the rest of the batch.
        prepare: search on the model as :func:`prepare` makes it ready, measured at the start; every verdict stays the
            model's own.
        return_details: return :class:`EvaluationResult`, whose report prints as a table and writes JSON.

    Returns:
        x with the examples that could be fooled replaced by points that fool, in ball and box exactly.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    if y is None:
        raise ValueError("y: got None, expected labels: robust accuracy is that of true classes")
    task = read(
        model, x, y, Objective("margin", False), eps=eps, norm=norm, clip=clip, normalize=normalize, autocast=autocast,
        output=output, mask=mask, tolerance=tolerance, seed=seed, first_example=first_example, check=check,
        prepare=prepare,
    )  # fmt: skip
    size, number = _inputs.integer(batch_size, "batch_size", 1), task.seed
    if number is None:
        raise TypeError("seed: got None, expected an integer")
    if not isinstance(certify_first, (bool, str)):
        raise TypeError(
            f"certify_first: got {ck.describe(certify_first)}, expected a bool or a method of compute_bounds"
        )
    attacks = planned(version, task.norm)
    options = {
        "normalize": normalize, "autocast": autocast, "output": output, "model_mode": model_mode, "tolerance": tolerance
    }  # fmt: skip
    images = x.detach() if not tolerance else task.hand_back(task.x0)
    evaluation = Evaluation(model, usable(images), task, attacks, options, size, number, progress, check)
    name = version if isinstance(version, str) else ", ".join(one.name for one in attacks)
    settings = {
        "eps": task.radius, "norm": task.norm, "clip": repr(task.box), "attacks": attacks, "options": options,
        "mask": task.fixed, "certify_first": certify_first, "batch_size": size, "seed": number,
        "first_example": task.numbers,
    }  # fmt: skip
    if prepare:  # rounding is another then
        settings["prepare"] = True
    path = None if state is None else Path(state)
    marks = {} if path is None else _state.fingerprint(model, images, task.labels, settings)  # type: ignore[arg-type]
    with undisturbed(model, model_mode):
        done = evaluation.go(name, certify_first, path, marks)
    return EvaluationResult(done.adv, ~done.robust, done.report) if return_details else done.adv


class Evaluation:
    """The attacks of an evaluation over a data set, in batches."""

    def __init__(
        self,
        model: Model,
        images: Tensor,
        task: Task,
        attacks: list[Planned],
        options: dict[str, Any],
        batch_size: int,
        seed: int,
        bar: bool,
        check: bool,
    ) -> None:
        self.model, self.images, self.task, self.attacks, self.options = model, images, task, attacks, options
        self.attacked = model
        self.batch_size, self.seed, self.bar, self.check = batch_size, seed, bar, check
        assert task.labels is not None
        self.labels: Tensor = task.labels
        self.victim: Victim = task.victim
        self.numbers = task.examples()
        self.samples = max([one.options.get("eot_samples", 1) for one in attacks], default=1)

    def go(self, version: str, certify_first: bool | str, path: Path | None, marks: dict[str, str]) -> Progress:
        self.attacked = self.task.searched().model if self.task.prepare else self.model
        found = None if path is None else _state.load(path, marks, self.images)
        here = self._clean(version) if found is None else found
        classes = self._classes()
        if classes:
            notes = fit_to_classes(self.attacks, classes)
            here.report.notes += [n for n in notes if n not in here.report.notes]
        if here.attack < 0:
            if certify_first and len(self.images):
                self._certify(here, _QUICK if certify_first is True else certify_first)
            here.attack, here.alive = 0, here.robust & ~here.proven
        while here.attack < len(self.attacks):
            self._attack(here, path, marks)
            if here.attack == 1 < len(self.attacks) and certify_first is True:
                self._certify(here, _TIGHT, again=True)
            here.alive = here.robust & ~here.proven
            if path is not None:
                _state.save(path, marks, here)
        self._last_words(here)
        return here

    def _classes(self) -> int:
        if not len(self.images):
            return 0
        with torch.no_grad():
            return self.victim(self._state_of(self.images[:1])).shape[1]

    def _state_of(self, images: Tensor) -> Tensor:
        return images.to(self.task.x0.dtype)

    def _outputs(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            total = self.victim(self._state_of(images))
            for _ in range(self.samples - 1):
                total = total + self.victim(self._state_of(images))
        return total

    def _clean(self, version: str) -> Progress:
        batch, device = len(self.images), self.images.device
        radius = self.task.radius
        report = EvaluationReport(
            version,
            _NORM_NAMES[self.task.norm],
            None if isinstance(radius, Tensor) else float(radius),
            batch,
            self.seed,
        )
        right = torch.zeros(batch, dtype=torch.bool, device=device)
        start, classes = time.perf_counter(), 0
        for index in torch.arange(batch, device=device).split(self.batch_size) if batch else ():
            before = None if classes or not self.check else _trust.Weights(self.model)
            outputs = self._outputs(self.images[index])
            if before is not None:
                ck.check_label_values(self.labels, "y", outputs.shape[1])
                self._doubts(outputs, index, report, before.changed())
            classes = outputs.shape[1]
            right[index] = outputs.argmax(1) == self.labels[index]
            report.forwards += len(index) * self.samples
        report.clean_accuracy = report.robust_accuracy = _share(right)
        report.seconds = time.perf_counter() - start
        if self.check and batch >= 20 and report.clean_accuracy <= 1.5 / max(classes, 1):
            self._warn(
                report,
                f"the model is right on {report.clean_accuracy:.1%} of the images, near the 1 in {classes} "
                "of chance: are they scaled, normalised and labelled as it expects?",
            )
        none = torch.zeros_like(right)
        return Progress(self.images.clone(), right, none, right, report)

    def _warn(self, report: EvaluationReport, note: str) -> None:
        report.notes.append(note)
        _trust.warn(note)

    def _doubts(self, outputs: Tensor, index: Tensor, report: EvaluationReport, changed: list[str]) -> None:
        if changed:
            self._warn(
                report,
                f"the model changes as it answers ({', '.join(changed[:3])}{', ...' * (len(changed) > 3)}): what it "
                "says depends on what it was asked before, and another run may find another accuracy",
            )
        means = outputs / self.samples
        if outputs.shape[1] > 1 and bool((means >= 0).all() & ((means.sum(1) - 1).abs() < 5e-3).all()):
            self._warn(
                report,
                "the model's outputs are >= 0 and sum to 1, as after softmax; attack it without its last "
                "softmax, which flattens the losses",
            )
        if not bool(outputs.isfinite().all()):
            self._warn(report, "the model's outputs are NaN or inf for some clean images")
        if self.samples == 1 and not _same(outputs, self._outputs(self.images[index])):
            self._warn(
                report,
                "the model gives other outputs for the same images: it is randomised, and one pass judges it "
                'by chance; version="rand" averages over 20',
            )
        elif self.samples == 1:
            self._dynamics(outputs, index, report)
        report.forwards += len(index) if self.samples == 1 else 0

    def _dynamics(self, outputs: Tensor, index: Tensor, report: EvaluationReport) -> None:
        """What a pass over two images alone tells."""
        some = self.images[index[:2]]
        apart, optimises = _trust.watched(self.model, lambda: self._outputs(some))
        report.forwards += len(some)
        if optimises:
            self._warn(
                report,
                "the model computes gradients in its forward pass, as defences that optimise or purify at test "
                "time do: gradients through it may mislead, and attacks made for it be stronger",
            )
        size = outputs.abs().amax().clamp_min(1e-6)
        if len(index) > 2 and bool(((outputs[:2] - apart).abs() > 0.01 * size).any()):
            self._warn(
                report,
                "the model's outputs for an image depend on the others in its batch: which examples are "
                "attacked together changes the result (is a normalisation in training mode?)",
            )

    def _part(self, value: Any, index: Tensor) -> Any:
        each = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == len(self.images)
        return value[index] if each else value

    def _common(self, index: Tensor) -> dict[str, Any]:
        box, fixed = self.task.box, self.task.fixed
        return {
            "eps": self._part(self.task.radius, index), "norm": self.task.norm,
            "clip": None if box is None else tuple(self._part(side, index) for side in box),
            "mask": None if fixed is None else ~fixed[index],
        }  # fmt: skip

    def _certify(self, here: Progress, method: str, again: bool = False) -> None:
        """``again``: of what was not proven; bounds that fail this time say nothing new."""
        start, report = time.perf_counter(), here.report
        model, why = self._readable()
        found = torch.zeros_like(here.proven)
        try:
            if why:
                raise ValueError(why)
            for index in (here.robust & ~here.proven).nonzero()[:, 0].split(self.batch_size):
                # outward rounding takes several times as long: the search for slopes is for those that bounds to
                # nearest prove
                for rounding in ("nearest", "outward") if again else ("outward",):
                    index = index[self._positive(model, index, method, rounding, _SEARCH if again else None)]
                found[index] = True
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            found.zero_()
            if not again:
                self._warn(report, f"certify_first: no example could be proven, all are attacked: {error}")
        here.proven |= found
        report.certified = int(here.proven.sum())
        report.seconds += time.perf_counter() - start

    def _positive(
        self, model: nn.Module, index: Tensor, method: str, rounding: str, slopes: SlopeSearch | None
    ) -> Tensor:
        """Whether all margins are, by their bounds."""
        if not len(index):
            return torch.zeros_like(index, dtype=torch.bool)
        common = self._common(index)
        bounds = compute_bounds(
            model, self.task.x0[index], common["eps"], norm=common["norm"], clip=common["clip"], method=method,
            labels=self.labels[index], sides="lower", rounding=rounding, slopes=slopes,
        )  # fmt: skip
        return (bounds.lower > 0).all(1)

    def _readable(self) -> tuple[nn.Module, str]:
        model = self.model
        if not isinstance(model, nn.Module):
            return nn.Identity(), "the model is no nn.Module"
        if self.options["autocast"] is not None or self.task.given in (torch.float16, torch.bfloat16):
            return model, "bounds hold for float32, not for what runs under autocast or in half precision"
        if self.options["output"] is not None:
            return model, "output= picks a part of what the model returns"
        if self.victim.mean is not None and self.victim.std is not None:
            return _Normalized(model, self.victim.mean, self.victim.std), ""
        return model, ""

    def _attack(self, here: Progress, path: Path | None, marks: dict[str, str]) -> None:
        one, report = self.attacks[here.attack], here.report
        rows = here.alive.nonzero()[:, 0]
        batches = rows.split(self.batch_size) if len(rows) else ()
        if here.batch == 0:
            report.attacks.append(AttackReport(one.name, robust_accuracy=report.robust_accuracy))
        entry = report.attacks[-1]
        with tqdm(disable=not self.bar, desc=one.name, total=len(rows), unit="example") as bar:
            bar.update(sum(len(b) for b in batches[: here.batch]))
            for index in batches[here.batch :]:
                start = time.perf_counter()
                adv, runs, extra = self._run(here.attack, index)
                broken = self._outputs(adv).argmax(1) != self.labels[index]
                here.adv[index[broken]] = adv[broken]
                here.robust[index[broken]] = False
                entry.still += sum(map(_stuck, runs)) if one.attack == "apgd" else 0
                forwards = sum(run.forwards for run in runs) + len(index) * (extra + self.samples)
                backwards = sum(run.backwards for run in runs) + len(index) * extra
                seconds, count = time.perf_counter() - start, int(broken.sum())
                entry.curve += _curve(runs, start, entry, seconds, count)
                for part in (entry, report):
                    part.seconds += seconds
                    part.forwards += forwards
                    part.backwards += backwards
                entry.attacked += len(index)
                entry.broken += count
                entry.robust_accuracy = report.robust_accuracy = _share(here.robust)
                here.batch += 1
                bar.set_postfix_str(f"robust {report.robust_accuracy:.2%}")
                bar.update(len(index))
                if path is not None and here.batch < len(batches):
                    _state.save(path, marks, here)
        if self.check and entry.still:
            self._warn(
                report,
                f"{one.name}: the gradient of {entry.still} examples that were not fooled was zero or NaN in the "
                "last step: gradient attacks have no strength there",
            )
        here.attack, here.batch = here.attack + 1, 0

    def _run(self, attack: int, index: Tensor) -> tuple[Tensor, list[Run], int]:
        """The points of one attack on some examples, the runs that it made, and other passes for each example."""
        x, y, one = self.images[index], self.labels[index], self.attacks[attack]
        runs: list[Run] = []
        common = {**self._common(index), **self.options}
        options, extra = dict(one.options), 0
        token = runs_of_now.set(runs)
        try:
            if one.name == "apgd-malt":
                options["targets"], extra = malt_targets(
                    self.victim, self._state_of(x), y, options["targets"], self.task.norm
                )
            # the numbers of the attacks lie apart: a run of one attack takes the next number
            key = (self.seed + (attack << 32)) % 2**64
            found = _ATTACKS[one.attack](
                self.attacked,
                x,
                y,
                **common,
                **options,
                seed=key,
                first_example=self.numbers[index],
                check=False,
                return_details=True,
            )
        finally:
            runs_of_now.reset(token)
        return found.adv, runs, extra

    def _last_words(self, here: Progress) -> None:
        report, first = here.report, True
        for entry in report.attacks:
            if entry.name == "square" and entry.broken and not first and self.check:
                note = (f"square broke {entry.broken} examples that attacks with gradients did not: do the gradients "
                        "mislead (masked, clipped, random)? Adaptive attacks are called for")  # fmt: skip
                if note not in report.notes:
                    self._warn(report, note)
            first = False


class _Normalized(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model((x - self.mean) / self.std)
        return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Also in where they are NaN."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else 0.0


def _curve(
    runs: list[Run], start: float, entry: AttackReport, seconds: float, count: int
) -> Iterator[tuple[float, int]]:
    """When examples of a batch left as fooled; the last pair holds what the verdict on the batch says."""
    found = 0
    for run in runs:
        for when, left in run.broken:
            found += left
            if found <= count:
                yield round(entry.seconds + when - start, 4), entry.broken + found
    if found != count:
        yield round(entry.seconds + seconds, 4), entry.broken + count


def _stuck(run: Run) -> int:
    if run.last is None:
        return 0
    stuck, free = run.stuck(*run.last)
    return int((stuck & free).sum())
