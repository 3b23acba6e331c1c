"""What every class with torchattacks' interface has: modes, normalisation, files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ..ops import _checks as ck
from . import _inputs
from ._modes import modules_of, owner, undisturbed

TargetMap = Callable[[Tensor, Any], Tensor]
_ROUNDING = 1e-6  # of float32 images that were normalised and come back
_HALF_ROUNDING = 4e-3


class Attack:
    """An attack with its settings, called as ``atk(inputs, labels)``: torchattacks' interface (3.5.1).

    Settings are plain attributes, read at each call. A class of your own gives ``forward(images, labels)``: images in
    [0, 1] to images in [0, 1]; ``get_logits`` and ``get_target_label`` are there for it.
    """

    _tolerance = _ROUNDING

    def __init__(self, name: str, model: Callable[[Tensor], Any], targeted: bool = False) -> None:
        self.attack = name
        self.set_model(model)
        self.device: Any = _place(model)
        self.attack_mode = "default"
        self.supported_mode = ["default", "targeted"] if targeted else ["default"]
        self.targeted = False
        self.normalization_used: dict[str, Tensor] | None = None
        self._target_map: TargetMap | None = None
        self._training = (False, False, False)  # the model, its BatchNorms, its Dropouts

    # ---- settings ----

    def _parts(self) -> Sequence[Attack]:
        """Attacks that share this one's settings."""
        return ()

    def set_model(self, model: Callable[[Tensor], Any]) -> None:
        self.model, self.model_name = model, type(model).__name__
        for part in self._parts():
            part.set_model(model)

    def set_device(self, device: Any) -> None:
        self.device = device
        for part in self._parts():
            part.set_device(device)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Inputs are normalised already: they are attacked as images in [0, 1], and handed back normalised."""
        centre, width = (torch.as_tensor(v, dtype=torch.float32).reshape(1, -1, 1, 1) for v in (mean, std))
        if centre.numel() != width.numel() or not bool((width > 0).all()):
            raise ValueError(f"std: got {width.flatten().tolist()}, expected {centre.numel()} numbers > 0")
        self.normalization_used = {"mean": centre, "std": width}
        for part in self._parts():
            part.set_normalization_used(mean, std)

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack the model in training mode, but for its BatchNorms and Dropouts unless they are asked for. Flags and
        running statistics come back as they were."""
        self._training = (bool(model_training), bool(batchnorm_training), bool(dropout_training))
        for part in self._parts():
            part.set_model_training_mode(model_training, batchnorm_training, dropout_training)

    def get_mode(self) -> str:
        return self.attack_mode

    def set_mode_default(self, quiet: bool = False) -> None:
        self.attack_mode, self.targeted, self._target_map = "default", False, None
        for part in self._parts():
            part.set_mode_default(True)
        if not quiet:
            print("Attack mode is changed to 'default.'")

    def _target(self, mode: str, target_map: TargetMap, quiet: bool) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError(f"{self.attack}: targeted mode is not supported.")
        self.attack_mode, self.targeted, self._target_map = mode, True, target_map
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    def set_mode_targeted_by_function(self, target_map_function: TargetMap | None, quiet: bool = False) -> None:
        """Targets are ``target_map_function(images, labels)``; None: the labels."""
        self._target("targeted(custom)", target_map_function or (lambda images, labels: labels), quiet)

    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Targets are drawn among the classes that are not the label, by torch's global generator."""
        self._target("targeted(random)", self.get_random_target_label, quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """The target is the class of the kth smallest logit among those that are not the label."""
        self._kth_min = _inputs.integer(kth_min, "kth_min", 1)
        self._target("targeted(least-likely)", self.get_least_likely_label, quiet)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """The labels that are given are the targets."""
        self._target("targeted(label)", lambda images, labels: labels, quiet)

    # ---- targets ----

    def get_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Of images in [0, 1]."""
        if self._target_map is None:
            raise ValueError("target_map_function is not initialized by set_mode_targeted.")
        found = self._target_map(inputs, labels)
        if found is None:
            raise ValueError(f"labels: got None, expected classes for mode {self.attack_mode!r}")
        return found

    def _others(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs = self.get_output_with_eval_nograd(images)
        return outputs, outputs.argmax(1) if labels is None else labels.to(outputs.device).long()

    def get_least_likely_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        outputs, labels = self._others(inputs, labels)
        if self._kth_min >= outputs.shape[1]:
            raise ValueError(
                f"kth_min: got {self._kth_min}, expected at most {outputs.shape[1] - 1}, the other classes"
            )
        others = outputs.scatter(1, labels[:, None], torch.inf)
        return others.kthvalue(self._kth_min, 1).indices

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        outputs, labels = self._others(inputs, labels)
        drawn = torch.randint(0, outputs.shape[1] - 1, (len(labels),)).to(labels.device)
        return drawn + (drawn >= labels)

    # ---- the model ----

    def normalize(self, inputs: Tensor) -> Tensor:
        if self.normalization_used is None:
            return inputs
        mean, std = (self.normalization_used[k].to(inputs.device, inputs.dtype) for k in ("mean", "std"))
        return (inputs - mean) / std

    def inverse_normalize(self, inputs: Tensor) -> Tensor:
        if self.normalization_used is None:
            return inputs
        mean, std = (self.normalization_used[k].to(inputs.device) for k in ("mean", "std"))
        return inputs.to(torch.promote_types(inputs.dtype, torch.float32)) * std + mean

    def get_logits(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        """Of images in [0, 1]."""
        return self.model(self.normalize(inputs))

    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        with undisturbed(self.model, "eval"), torch.no_grad():
            outputs: Tensor = self.get_logits(inputs)
        return outputs

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """In training mode where that was asked for; the attacks themselves see to eval mode."""
        model, norms, dropouts = self._training
        modules = modules_of(self.model) if model else []
        flags = [m.training for m in modules]
        try:
            for m in modules:
                name = type(m).__name__
                m.training = (norms or "BatchNorm" not in name) and (dropouts or "Dropout" not in name)
            yield
        finally:
            for m, flag in zip(modules, flags, strict=True):
                m.training = flag

    def _common(self) -> dict[str, Any]:
        """Options of the attack functions."""
        used = self.normalization_used
        return {
            "normalize": None if used is None else (used["mean"].flatten(), used["std"].flatten()),
            "model_mode": "keep" if self._training[0] else "eval",
            "tolerance": self._tolerance,
        }

    # ---- the attack ----

    def _attack(self, images: Tensor, goal: Tensor | None) -> Tensor:
        """``goal``: the classes to reach in a targeted mode, else the labels."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._attack(inputs, self.get_target_label(inputs, labels) if self.targeted else labels)

    def __call__(self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        inputs = ck.need_tensor(inputs, "inputs").detach()
        labels = None if labels is None else ck.need_tensor(labels, "labels")
        if self.device is not None:
            inputs, labels = inputs.to(self.device), None if labels is None else labels.to(self.device)
        half = inputs.dtype in (torch.float16, torch.bfloat16)
        self._tolerance = _HALF_ROUNDING if half and self.normalization_used is not None else _ROUNDING
        with self._modes():
            images = self.inverse_normalize(inputs)
            adv = self.forward(images, labels, *args, **kwargs)
        if self.normalization_used is None:
            return adv
        # what did not change comes back bit for bit
        return torch.where(adv == images, inputs, self.normalize(adv).to(inputs.dtype))

    def __repr__(self) -> str:
        skipped = ("model", "attack", "supported_mode", "normalization_used")
        shown = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in skipped}
        shown["normalization_used"] = self.normalization_used is not None
        return f"{self.attack}({', '.join(f'{k}={v}' for k, v in shown.items())})"

    # ---- files ----

    def save(
        self,
        data_loader: Iterable[Any],
        save_path: Any = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> Any:
        """Attacks every batch of a loader and writes one file at the end (also after an exception, of the batches that
        were done): adversarial images in [0, 1], labels, and what else is asked for. ``save_type="int"`` writes the
        nearest 8-bit pixels.

        Returns:
            With ``return_verbose`` robust accuracy in percent, the mean L2 distance of examples that are fooled, and
            the seconds of the last batch.
        """
        if save_type not in ("float", "int"):
            raise ValueError(f"save_type: got {save_type!r}, expected 'float' or 'int'")
        kept: dict[str, list[Tensor]] = {"adv_inputs": [], "labels": []}
        kept |= {"preds": []} if save_predictions else {}
        kept |= {"clean_inputs": []} if save_clean_inputs else {}
        right, total, far, fooled, rob_acc, l2, seconds = 0, 0, 0.0, 0, 0.0, 0.0, 0.0
        batches = len(data_loader) if isinstance(data_loader, Sized) else 0
        try:
            for step, (inputs, labels) in enumerate(data_loader):
                start = time.perf_counter()
                adv = self(inputs, labels)
                inputs, labels = inputs.to(adv.device), labels.to(adv.device)
                with undisturbed(self.model, "eval"), torch.no_grad():
                    pred = self.model(adv).argmax(1)
                held = pred == labels
                right, total = right + int(held.sum()), total + len(labels)
                lengths = (adv - inputs)[~held].flatten(1).float().norm(dim=1)
                far, fooled = far + float(lengths.sum()), fooled + len(lengths)
                rob_acc, l2 = 100 * right / max(total, 1), far / fooled if fooled else float("nan")
                seconds = time.perf_counter() - start
                found = {"adv_inputs": adv, "labels": labels, "preds": pred, "clean_inputs": inputs}
                if save_path is not None:
                    for name, parts in kept.items():
                        parts.append(found[name].detach().cpu())
                if verbose:
                    share = 100 * (step + 1) / batches if batches else float("nan")
                    self._save_print(share, rob_acc, l2, seconds, end="\n" if step + 1 == batches else "\r")
        finally:
            if save_path is not None and kept["labels"]:
                self._write(kept, save_path, save_type)
        return (rob_acc, l2, seconds) if return_verbose else None

    def _write(self, kept: dict[str, list[Tensor]], path: Any, save_type: str) -> None:
        content: dict[str, Any] = {name: torch.cat(parts) for name, parts in kept.items()}
        for name in ("adv_inputs", "clean_inputs"):
            if name in content:
                images = self.inverse_normalize(content[name])
                images = images if self.normalization_used is None else images.clamp(0, 1)
                content[name] = self.to_type(images, "int") if save_type == "int" else images
        torch.save({**content, "save_type": save_type}, path)

    @staticmethod
    def to_type(inputs: Tensor, type: str) -> Tensor:
        """Images in [0, 1] and the nearest 8-bit pixels; torchattacks cuts off, which takes a level from most of
        them."""
        if type == "int":
            return (inputs * 255).round().to(torch.uint8) if inputs.is_floating_point() else inputs
        if type == "float":
            return inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
        raise ValueError(f"type: got {type!r}, expected 'float' or 'int'")

    @staticmethod
    def _save_print(progress: float, rob_acc: float, l2: float, elapsed_time: float, end: str) -> None:
        print(
            f"- Save progress: {progress:2.2f} % / Robust accuracy: {rob_acc:2.2f} % / L2: {l2:1.5f} "
            f"({elapsed_time:2.3f} it/s) \t",
            end=end,
        )

    @staticmethod
    def load(
        load_path: Any,
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: dict[str, Sequence[float]] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> DataLoader[Any]:
        """A loader of what :meth:`save` wrote, normalised again with ``normalize={"mean": ..., "std": ...}``."""
        content: dict[str, Any] = torch.load(load_path, weights_only=True)
        names = ["adv_inputs", "labels"]
        names += ["preds"] if load_predictions else []
        names += ["clean_inputs"] if load_clean_inputs else []
        missing = [name for name in names if name not in content]
        if missing:
            raise ValueError(f"{load_path}: got no {missing[0]}, expected a file that was saved with them")
        for name in ("adv_inputs", "clean_inputs"):
            if name in content:
                images = Attack.to_type(content[name], "float")
                if normalize is not None:
                    mean, std = (torch.tensor(normalize[k]).reshape(1, -1, 1, 1) for k in ("mean", "std"))
                    images = (images - mean) / std
                content[name] = images
        print(f"Data is loaded in the following order: [{', '.join(names)}]")
        return DataLoader(TensorDataset(*[content[name] for name in names]), batch_size=batch_size, shuffle=shuffle)


def _place(model: Any) -> torch.device | None:
    """Where the model is; None, inputs stay where they are, for a callable without parameters."""
    module = owner(model)
    if isinstance(module, torch.nn.Module):
        for t in (*module.parameters(), *module.buffers()):
            return t.device
    return None
