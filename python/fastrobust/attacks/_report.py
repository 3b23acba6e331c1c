"""What an evaluation by several attacks found, attack by attack."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass
class AttackReport:
    """One attack of an evaluation: ``forwards`` and ``backwards`` count images, ``robust_accuracy`` is what is left
    after it. ``curve``: (seconds since the attack began, examples broken until then), a pair where examples left a
    batch."""

    name: str
    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0
    attacked: int = 0
    broken: int = 0
    robust_accuracy: float = 0.0
    still: int = 0  # examples whose gradient was zero or NaN in the last step, and that were not fooled
    curve: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def append(self, other: AttackReport) -> None:
        """Goes on with what the same attack did to other examples."""
        self.curve += [(self.seconds + s, self.broken + n) for s, n in other.curve]
        for name in ("seconds", "forwards", "backwards", "attacked", "broken", "still"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclasses.dataclass
class EvaluationReport:
    """Accuracies are shares of all examples. ``certified``: the number proven robust by bounds (None: nobody asked);
    the true robust accuracy lies between ``certified / examples`` and ``robust_accuracy``."""

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
        attacks = [
            AttackReport(**{**a, "curve": [tuple(pair) for pair in a.get("curve", [])]}) for a in values.pop("attacks")
        ]
        return cls(**values, attacks=attacks)

    @classmethod
    def of_parts(cls, parts: Sequence[EvaluationReport]) -> EvaluationReport:
        """One report of a data set evaluated in parts (by several processes): counts and seconds are sums, so the
        seconds are those of one process that does all parts, attack by attack."""
        if not parts:
            raise ValueError("parts: got none, expected at least one report")
        first, examples = parts[0], sum(p.examples for p in parts)
        share = lambda name: sum(getattr(p, name) * p.examples for p in parts) / max(examples, 1)
        asked = all(p.certified is not None for p in parts)
        whole = cls(
            first.version,
            first.norm,
            first.eps if all(p.eps == first.eps for p in parts) else None,
            examples,
            first.seed,
            share("clean_accuracy"),
            sum(p.certified or 0 for p in parts) if asked else None,
            share("robust_accuracy"),
            *(sum(getattr(p, n) for p in parts) for n in ("seconds", "forwards", "backwards")),
        )
        left = round(whole.clean_accuracy * examples)
        for k, entry in enumerate(first.attacks):
            total = AttackReport(entry.name)
            for part in parts:
                total.append(part.attacks[k])
            left -= total.broken
            total.robust_accuracy = left / max(examples, 1)
            whole.attacks.append(total)
        for part in parts:
            whole.notes += [note for note in part.notes if note not in whole.notes]
        return whole

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
                f"{'proven':<12}{'':>9}{self.certified:>8}{100 * share:>7.2f} %  (what is proven is attacked no more)"
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
