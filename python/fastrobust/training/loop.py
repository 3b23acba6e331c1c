"""The training loop: any model, optimiser and loader, any method."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .._record import unwrapped
from ..attacks._modes import undisturbed
from . import checkpoint as files
from . import distributed
from . import evaluate as judged
from .averaging import Average, Averaging, averaging
from .batches import examples_of, unpack
from .method import Batch, Loss, Method
from .precision import Stepper, mixed
from .rates import Rates
from .registry import make

Record = dict[str, float]
Callback = Callable[[nn.Module, Record], Any]


class TrainingDiverged(RuntimeError):
    """A loss or a weight became NaN or infinite; ``epoch`` and ``batch`` are counted from 1."""

    def __init__(self, what: str, epoch: int, batch: int) -> None:
        super().__init__(
            f"{what} in epoch {epoch}, batch {batch}: nothing of this epoch is kept; a checkpoint holds the epochs "
            "before"
        )
        self.epoch, self.batch = epoch, batch


def train(
    model: nn.Module,
    loader: Iterable[Any],
    method: Method | str = "pgd",
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    evaluate: Any = None,
    callbacks: Callback | Iterable[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    average: Averaging | str | None = None,
    autocast: torch.dtype | None = None,
    max_grad_norm: float | None = None,
    progress: bool = False,
    on_epoch: Callback | None = None,
) -> list[Record]:
    """Train a model by a method; one record an epoch.

    Args:
        model: changed in place. Of a DistributedDataParallel its module is trained.
        loader: any iterable of (images, labels) or (images, labels, numbers of the examples), gone through once an
            epoch; ``set_epoch`` of it or of its sampler is called. :func:`fastrobust.training.loader` makes one of
            tensors.
        method: an object or a name of :func:`fastrobust.training.methods`, with its paper's settings.
        optimizer: default SGD 0.1, momentum 0.9, weight decay 5e-4, of the parameters that require a gradient.
        scheduler: a torch scheduler (stepped after each epoch; OneCycleLR and CyclicLR after each batch), a sequence of
            one rate for each epoch, or a callable from the share of the training that is done, in [0, 1), to a rate.
        evaluate: held-out (images, labels), attacked with the method's eps; an :class:`Evaluation`; or a callable from
            the model to a dictionary of numbers. They enter the records as ``eval_...``, and choose the best epoch.
        callbacks: called as callback(model, record) after every epoch, once its checkpoint is written.
        checkpoint: a folder for ``last.pt``, ``previous.pt`` and, with ``evaluate``, ``best.pt`` (weights and record).
        resume: go on from the folder's last checkpoint, with the same bits as if nothing had happened, or begin where
            there is none. False: the folder must not hold a training yet.
        average: "ema", "swa" or :class:`Averaging`: evaluated and saved instead of the weights, and what the model
            carries at the end.
        autocast: torch.bfloat16 or torch.float16 for the passes of the model; attacks and losses stay in float32.
        max_grad_norm: gradients are scaled down to this l2 norm.
        progress: a bar with loss, accuracies and rate.

    Under torchrun (with torch.distributed initialised) gradients are averaged over the processes.

    Returns:
        Records: epoch (from 1), loss, accuracy (on the examples as they were trained on), lr, seconds, the method's own
        metrics, ``eval_...``.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected. TrainingDiverged: NaN.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, numbers.Integral) or epochs < 0:
        raise ValueError(f"epochs: got {epochs!r}, expected an integer of at least 0")
    # a compiled model runs compiled; of DDP only the module is needed, since gradients are averaged here
    model = model.module if isinstance(model, DistributedDataParallel) else model
    method, epochs = make(method), int(epochs)
    learned = [p for p in model.parameters() if p.requires_grad]
    if not learned:
        raise ValueError("model: got no parameter that requires a gradient, expected at least one")
    if optimizer is None:
        optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = len(loader) if hasattr(loader, "__len__") else 0
    how = averaging(average)
    run = _Run(
        model, loader, method, epochs, steps, Rates(optimizer, scheduler, epochs, steps),
        Stepper(optimizer, autocast, learned[0].device), Average(unwrapped(model), how) if how else None, max_grad_norm,
    )  # fmt: skip
    judge = judged.evaluation(evaluate, method)
    folder = None if checkpoint is None else Path(checkpoint)
    called = [callbacks] if callable(callbacks) else list(callbacks)
    called += [] if on_epoch is None else [on_epoch]

    distributed.start_equal(model)
    method.begin(model, examples_of(loader), epochs)
    history: list[Record] = []
    if folder is not None:
        run.settings = run.describe()
        history = run.load(folder, resume)
    chooses = _may_choose(judge, loader)
    with mixed(model, autocast), run.bar(progress, len(history)):
        for epoch in range(len(history), epochs):
            record = run.epoch(epoch)
            with run.averaged():
                if judge is not None and ((epoch + 1) % getattr(judge, "every", 1) == 0 or epoch + 1 == epochs):
                    record |= {f"eval_{name}": float(value) for name, value in judge(model).items()}
                    _watch(method, history, record)
                history.append(record)
                if folder is not None and chooses and _is_best(history):
                    _save_best(folder, model, record)
            run.show(record)
            if folder is not None:
                run.save(folder, history)
            for callback in called:
                callback(model, record)
        if run.average is not None:
            run.average.put(run.batches)
    return history


@dataclasses.dataclass
class _Run:
    """What belongs to one training, and one epoch of it."""

    model: nn.Module
    loader: Iterable[Any]
    method: Method
    epochs: int
    steps: int
    rates: Rates
    stepper: Stepper
    average: Average | None
    max_grad_norm: float | None
    classes: int | None = None
    ticker: Any = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    said: str = ""  # of the last evaluation, for the bar

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def batches(self, epoch: int = 0) -> Iterator[Any]:
        """Those of an epoch, for loaders that are told which."""
        holders: list[Any] = [self.loader, getattr(self.loader, "sampler", None)]
        for holder in holders:
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
        return iter(self.loader)

    def epoch(self, epoch: int) -> Record:
        self.method.begin_epoch(self.model, epoch, self.epochs)
        start, sums = time.perf_counter(), {"loss": 0.0, "accuracy": 0.0, "count": 0.0}
        for step, item in enumerate(self.batches(epoch)):
            x, y, index = unpack(item, step, self.method.needs_index, self.classes)
            if self.classes is None:
                self._look(x)
                unpack(item, step, self.method.needs_index, self.classes)
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            index = None if index is None else index.to(self.device)
            batch = Batch(x, y, index, epoch, self.epochs, step, self.steps)
            self.rates.before(batch)
            found = self.method.step(self.model, batch, self._update(batch))
            _add(sums, found, batch)
            self.rates.after_batch()
            self._tick(sums)
        sums = distributed.total(sums, self.device)
        count = sums.pop("count")
        if not count:
            raise ValueError(
                f"loader: got no batch in epoch {epoch + 1}, expected at least one (an iterable that begins anew each "
                "epoch)"
            )
        distributed.average_statistics(self.model)
        if not all(bool(t.isfinite().all()) for t in self.model.parameters()):
            raise TrainingDiverged("weights are NaN or infinite", epoch + 1, step + 1)
        if self.average is not None:
            self.average.after_epoch((epoch + 1) / self.epochs)
        rate = float(self.stepper.optimizer.param_groups[0]["lr"])
        self.rates.after_epoch()
        means = {name: value / count for name, value in sums.items()}
        return {"epoch": epoch + 1.0, **means, "lr": rate, "seconds": time.perf_counter() - start}

    def _update(self, batch: Batch) -> Callable[[Tensor], None]:
        def update(loss: Tensor) -> None:
            self.stepper.backward(loss)
            mean = distributed.average_gradients(self.stepper.parameters(), loss, len(batch.x))
            if not math.isfinite(mean):
                raise TrainingDiverged(f"the loss is {mean}", batch.epoch + 1, batch.step + 1)
            self.stepper.move(self.max_grad_norm)
            if self.average is not None:
                self.average.after_step(batch.progress)

        return update

    def _look(self, x: Tensor) -> None:
        """How many classes the model tells apart, so that labels can be checked before anything moves."""
        with undisturbed(self.model, "eval"), torch.no_grad():
            out = self.model(x[:1].to(self.device))
        self.classes = out.shape[1] if isinstance(out, Tensor) and out.dim() == 2 else sys.maxsize

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        with contextlib.nullcontext() if self.average is None else self.average.applied(self.batches):
            yield

    # -- the bar -------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def bar(self, shown: bool, done: int) -> Iterator[None]:
        show = shown and distributed.rank_and_world()[0] == 0
        total = self.epochs * self.steps or None
        with tqdm(
            total=total, initial=done * self.steps, unit="batch", disable=not show, file=sys.stderr
        ) as self.ticker:
            yield

    def _tick(self, sums: dict[str, float]) -> None:
        if self.ticker is not None and not self.ticker.disable:
            here = f"loss {sums['loss'] / sums['count']:.3f} acc {100 * sums['accuracy'] / sums['count']:.1f} %"
            self.ticker.set_postfix_str(here + self.said, refresh=False)
            self.ticker.update()

    def show(self, record: Record) -> None:
        found = [
            f"{name.removeprefix('eval_')} {100 * v:.1f} %" for name, v in record.items() if name.startswith("eval_")
        ]
        self.said = "".join(f" {text}" for text in found) or self.said
        if self.ticker is not None:
            self.ticker.set_description(f"{self.method.name} {record['epoch']:.0f}/{self.epochs}", refresh=False)

    # -- checkpoints ---------------------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be taken up."""
        groups = [
            {k: files.plain(v) for k, v in group.items() if k != "params"}
            for group in self.stepper.optimizer.param_groups
        ]
        return {
            "method": self.method.name,
            **{f"method.{k}": files.plain(v) for k, v in self.method.settings().items()},
            "epochs": self.epochs,
            "batches": self.steps,
            "examples": examples_of(self.loader),
            "optimizer": [type(self.stepper.optimizer).__name__, *groups],
            "average": str(self.average and self.average.how),
            "scheduler": type(self.rates.scheduler).__name__,
            "autocast": str(self.stepper.dtype),
            "max_grad_norm": self.max_grad_norm,
            "processes": distributed.rank_and_world()[1],
            "model": {n: list(t.shape) for n, t in unwrapped(self.model).state_dict().items() if isinstance(t, Tensor)},
        }

    def save(self, folder: Path, history: list[Record]) -> None:
        """By the first process, with what each process has of its own."""
        own = {
            "random": files.random_state(),
            "method": self.method.state_dict(),
            "loader": files.loader_state(self.loader),
        }
        each = distributed.gather(own)
        if distributed.rank_and_world()[0] == 0:
            files.save(
                folder,
                {
                    "settings": self.settings,
                    "history": history,
                    "model": unwrapped(self.model).state_dict(),
                    "stepper": self.stepper.state_dict(),
                    "rates": self.rates.state_dict(),
                    "average": self.average.state_dict() if self.average else {},
                    "processes": each,
                },
            )
        distributed.wait()

    def load(self, folder: Path, resume: bool) -> list[Record]:
        content = files.load(folder)
        if content is None:
            return []
        if not resume:
            raise ValueError(
                f"checkpoint: got {folder}, which holds a training already; pass resume=True to go on with it, "
                "or give another folder"
            )
        files.compare(content["settings"], self.settings)
        unwrapped(self.model).load_state_dict(content["model"])
        self.stepper.load_state_dict(content["stepper"])
        self.rates.load_state_dict(content["rates"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        own = content["processes"][distributed.rank_and_world()[0]]
        self.method.load_state_dict(own["method"])
        files.set_loader_state(self.loader, own["loader"])
        files.set_random_state(own["random"])
        return list(content["history"])


def _add(sums: dict[str, float], found: Loss, batch: Batch) -> None:
    n = len(batch.x)
    labels = batch.y if found.labels is None else found.labels
    labels = labels.argmax(1) if labels.dim() == found.logits.dim() == 2 else labels
    sums["loss"] += float(found.value.detach()) * n
    guess = found.logits.argmax(1) if found.logits.dim() > 1 else found.logits
    if guess.shape == labels.shape:
        sums["accuracy"] += float((guess == labels).sum()) * n / labels.numel()
    sums["count"] += n
    for name, value in found.metrics.items():
        sums[name] = sums.get(name, 0.0) + float(value) * n


def _watch(method: Method, history: list[Record], record: Record) -> None:
    """Says once when accuracy under one step and under many part; nobody expects either of plain training."""
    if type(method) is not Method and judged.parted(record) and not any(map(judged.parted, history)):
        judged.warn_parted(record)


def _may_choose(judge: Any, loader: Any) -> bool:
    """The best epoch is chosen on images that the training has not seen."""
    images = getattr(loader, "images", None)
    if isinstance(judge, judged.Evaluation) and isinstance(images, Tensor):
        share = judge.share_of(images)
        if share > 0.5:
            warnings.warn(
                f"evaluate: {share:.0%} of its images are trained on; no best epoch is chosen by them",
                UserWarning,
                stacklevel=3,
            )
            return False
    return judge is not None


def _is_best(history: list[Record]) -> bool:
    now, *before = (judged.score(r) for r in reversed(history))
    return now is not None and all(score is None or score < now for score in before)


def _save_best(folder: Path, model: nn.Module, record: Record) -> None:
    if distributed.rank_and_world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / "best.pt", {"model": unwrapped(model).state_dict(), "record": record})


__all__ = ["Callback", "Record", "TrainingDiverged", "train"]
