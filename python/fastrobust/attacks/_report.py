"""What an evaluation by several attacks found, attack by attack."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass
class AttackReport:
    """One attack of an evaluation: ``forwards`` and ``backwards`` count images, ``robust_accuracy`` is what is left after
    it."""

    name: str
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    attacked: int = 0
    broken: int = 0
    robust_accuracy: float = 0.0


@dataclasses.dataclass
class EvaluationReport:
    """Accuracies are shares of all examples. ``certified``: the number proven robust before any attack (None: nobody
    asked); the true robust accuracy lies between ``certified / examples`` and ``robust_accuracy``."""

    version: str
    norm: str
    eps: float | None  # None: one for each example
    examples: int
    seed: int
    clean_accuracy: float = 0.0
    certified: int | None = None
    robust_accuracy: float = 0.0
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    attacks: list[AttackReport] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        values: dict[str, Any] = json.loads(text)
        attacks = [AttackReport(**a) for a in values.pop("attacks")]
        return cls(**values, attacks=attacks)

    def __str__(self) -> str:
        eps = "each its own" if self.eps is None else f"{self.eps:g}"
        lines = [f"{self.version}, {self.norm}, eps {eps}, {self.examples} examples, seed {self.seed}"]
        head = (
            f"{'attack':<12}{'attacked':>9}{'broken':>8}{'robust':>9}{'seconds':>10}{'forwards':>11}{'backwards':>11}"
        )
        lines += [head, f"{'clean':<12}{'':>9}{'':>8}{100 * self.clean_accuracy:>7.2f} %"]
        if self.certified is not None:
            share = self.certified / max(self.examples, 1)
            lines.append(
                f"{'proven':<12}{'':>9}{self.certified:>8}{100 * share:>7.2f} %  (proven examples are not attacked)"
            )
        lines += [
            f"{a.name:<12}{a.attacked:>9}{a.broken:>8}{100 * a.robust_accuracy:>7.2f} %{a.seconds:>10.1f}"
            f"{a.forwards:>11}{a.backwards:>11}"
            for a in self.attacks
        ]
        lines.append(
            f"{'all':<12}{'':>9}{'':>8}{100 * self.robust_accuracy:>7.2f} %{self.seconds:>10.1f}"
            f"{self.forwards:>11}{self.backwards:>11}"
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
