"""The public AutoAttack's interface on this package's attacks: switch by changing the import.

Covered: the constructor, ``attacks_to_run``, ``version`` and ``set_version``, ``run_standard_evaluation`` (with
``state_path``, which here does resume), ``run_standard_evaluation_individual``, ``clean_accuracy``, and the settings
that people change: ``apgd`` (n_restarts, n_iter, eot_iter, rho, use_largereps), ``apgd_targeted`` (also
n_target_classes), ``fab`` (n_restarts, n_iter, n_target_classes, alpha_max, eta, beta) and ``square`` (n_queries,
n_restarts, p_init, resc_schedule). Not covered: TensorFlow models, and the attack objects' own ``perturb``. Random
numbers are this package's own.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import _checks as ck
from ._model import Victim
from ._modes import owner, undisturbed
from ._report import EvaluationReport
from .autoattack import EvaluationResult, autoattack

# torchattacks' classes, but for its AutoAttack, whose name is taken here
from .classes import APGD as APGD
from .classes import APGDT as APGDT
from .classes import BIM as BIM
from .classes import CW as CW
from .classes import EOTPGD as EOTPGD
from .classes import FAB as FAB
from .classes import FFGSM as FFGSM
from .classes import FGSM as FGSM
from .classes import IFGSM as IFGSM
from .classes import PGD as PGD
from .classes import PGDL2 as PGDL2
from .classes import TPGD as TPGD
from .classes import VANILA as VANILA
from .classes import Attack as Attack
from .classes import DeepFool as DeepFool
from .classes import MultiAttack as MultiAttack
from .classes import Square as Square

if not TYPE_CHECKING:
    from .classes import __getattr__ as __getattr__


@dataclasses.dataclass
class APGDSettings:
    n_restarts: int = 5
    n_iter: int = 100
    eot_iter: int = 1
    rho: float = 0.75
    use_largereps: bool = False

    def options(self) -> dict[str, Any]:
        return {
            "restarts": self.n_restarts, "steps": self.n_iter, "eot_samples": self.eot_iter, "rho": self.rho,
            "large_radii": self.use_largereps,
        }  # fmt: skip


@dataclasses.dataclass
class TargetedSettings(APGDSettings):
    n_restarts: int = 1
    n_target_classes: int = 9

    def options(self) -> dict[str, Any]:
        return {**super().options(), "targets": self.n_target_classes}


@dataclasses.dataclass
class FABSettings:
    n_restarts: int = 5
    n_iter: int = 100
    n_target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def options(self, targeted: bool) -> dict[str, Any]:
        """The public one gives the targeted attack one restart, whatever is set."""
        more = {"targets": self.n_target_classes} if targeted else {"restarts": self.n_restarts}
        return {"steps": self.n_iter, "alpha_max": self.alpha_max, "eta": self.eta, "beta": self.beta, **more}


@dataclasses.dataclass
class SquareSettings:
    n_queries: int = 5000
    n_restarts: int = 1
    p_init: float = 0.8
    resc_schedule: bool = False

    def options(self) -> dict[str, Any]:
        return {
            "queries": self.n_queries, "restarts": self.n_restarts, "share": self.p_init, "rescale": self.resc_schedule
        }  # fmt: skip


class AutoAttack:
    """``AutoAttack(model, norm="Linf", eps=8/255).run_standard_evaluation(x, y)``.

    ``device`` None is the model's own. ``report`` is the :class:`EvaluationReport` of the last evaluation.
    """

    def __init__(
        self,
        model: Any,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: list[str] | None = None,
        version: str = "standard",
        is_tf_model: bool = False,
        device: Any = None,
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        ck.parse_norm(norm)
        if is_tf_model:
            raise ValueError("is_tf_model: got True, expected False: models are PyTorch's")
        if version not in ("standard", "plus", "rand", "custom"):
            raise ValueError(f"version: got {version!r}, expected 'standard', 'plus', 'rand' or 'custom'")
        self.norm: Any = norm
        self.model, self.epsilon, self.seed = model, eps, seed
        self.verbose, self.version, self.device, self.log_path = verbose, version, device, log_path
        self.attacks_to_run: list[str] = list(attacks_to_run or [])
        self.apgd, self.apgd_targeted = APGDSettings(), TargetedSettings()
        self.fab, self.square = FABSettings(), SquareSettings()
        self.report: EvaluationReport | None = None
        if version != "custom":
            if self.attacks_to_run:
                raise ValueError(
                    f"attacks_to_run: got {self.attacks_to_run} with version {version!r}, expected version='custom', "
                    "or no list"
                )
            self.set_version(version)

    def set_version(self, version: str = "standard") -> None:
        sparse = ck.parse_norm(self.norm) == 1
        self.version = version
        if version == "standard":
            self.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t", "square"]
            self.apgd.n_restarts, self.apgd_targeted.n_target_classes = (5, 5) if sparse else (1, 9)
            self.apgd.use_largereps = self.apgd_targeted.use_largereps = sparse
            self.fab.n_restarts = 1
        elif version == "plus":
            self.attacks_to_run = ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
            self.apgd.n_restarts, self.fab.n_restarts, self.apgd_targeted.n_target_classes = 5, 5, 9
        elif version == "rand":
            self.attacks_to_run = ["apgd-ce", "apgd-dlr"]
            self.apgd.n_restarts, self.apgd.eot_iter = 1, 20
        else:
            raise ValueError(f"version: got {version!r}, expected 'standard', 'plus' or 'rand'")

    def _options(self, name: str) -> dict[str, Any]:
        if name in ("apgd-ce", "apgd-dlr"):
            return self.apgd.options()
        if name == "apgd-t":
            return self.apgd_targeted.options()
        if name in ("fab", "fab-t"):
            return self.fab.options(name == "fab-t")
        if name == "square":
            return self.square.options()
        raise ValueError(
            f"attacks_to_run: got {name!r}, expected of 'apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square'"
        )

    def _place(self, x: Tensor) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        module = owner(self.model)
        if isinstance(module, torch.nn.Module):
            for t in (*module.parameters(), *module.buffers()):
                return t.device
        return x.device

    def _run(self, names: list[str], x: Tensor, y: Tensor, bs: int, state: Any) -> EvaluationResult:
        place = self._place(ck.need_tensor(x, "x_orig"))
        seed = int(time.time()) if self.seed is None else self.seed
        found = autoattack(
            self.model,
            x.to(place),
            ck.need_tensor(y, "y_orig").to(place),
            eps=self.epsilon,
            norm=self.norm,
            batch_size=bs,
            seed=seed,
            state=state,
            version=[(name, self._options(name)) for name in names],
            return_details=True,
        )
        self.report = found.report
        if self.verbose:
            print(found.report)
        if self.log_path is not None:
            with open(self.log_path, "a") as log:
                log.write(f"{found.report}\n")
        return found._replace(adv=found.adv.to(x.device))

    def _labels(self, x: Tensor, bs: int) -> Tensor:
        place = self._place(x)
        with undisturbed(self.model, "eval"), torch.no_grad():
            parts = [Victim(self.model)(part.to(place)).argmax(1).to(x.device) for part in x.split(bs)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)

    def run_standard_evaluation(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False, state_path: Any = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The adversarial examples on x's device; rows that hold out stay clean."""
        adv = self._run(self.attacks_to_run, x_orig, y_orig, bs, state_path).adv
        return (adv, self._labels(adv, bs)) if return_labels else adv

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Each attack by itself, on all examples; the object stays as it is but for ``report``."""
        found: dict[str, Any] = {}
        for name in self.attacks_to_run:
            adv = self._run([name], x_orig, y_orig, bs, None).adv
            found[name] = (adv, self._labels(adv, bs)) if return_labels else adv
        return found

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        return float((self._labels(x_orig, bs) == y_orig).double().mean())
