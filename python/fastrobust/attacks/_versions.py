"""Which attacks an evaluation runs, with what settings (Croce & Hein 2020; norm 1: 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..ops import _checks as ck
from ._trust import warn

VERSIONS = ("standard", "plus", "rand", "fast")
_BASE: dict[str, tuple[str, dict[str, Any]]] = {
    "apgd-ce": ("apgd", {"loss": "ce"}),
    "apgd-dlr": ("apgd", {"loss": "dlr"}),
    "apgd-t": ("apgd", {"loss": "dlr", "targets": 9}),
    "apgd-malt": ("apgd", {"loss": "dlr", "targets": 3}),  # the targets in the order of MALT (arXiv 2407.02240)
    "fab": ("fab", {}),
    "fab-t": ("fab", {"targets": 9}),
    "square": ("square", {}),
}
_OWN = {
    "apgd": {"steps", "loss", "targets", "restarts", "rho", "momentum", "large_radii", "eot_samples"},
    "fab": {"steps", "targets", "restarts", "alpha_max", "eta", "beta"},
    "square": {"queries", "restarts", "loss", "share", "rescale"},
}


@dataclasses.dataclass
class Planned:
    """An attack by its name in reports, the function that makes it, and its options."""

    name: str
    attack: str
    options: dict[str, Any]

    @property
    def needs_classes(self) -> int:
        """Below so many the DLR loss is not defined."""
        return 0 if self.options.get("loss") != "dlr" else 4 if "targets" in self.options else 3


def planned(version: Any, norm: float) -> list[Planned]:
    """The attacks of a version, or of a list of names and (name, options)."""
    if isinstance(version, str):
        if version not in VERSIONS:
            raise ValueError(
                f"version: got {version!r}, expected one of {', '.join(VERSIONS)}, or a list of attacks "
                f"({', '.join(_BASE)})"
            )
        return [_one(name, options) for name, options in _of_version(version, norm)]
    if not isinstance(version, Iterable):
        raise TypeError(f"version: got {ck.describe(version)}, expected a name or a list of attacks")
    large = {"large_radii": True} if norm == 1 else {}
    found = []
    for item in version:
        name, options = (item, {}) if isinstance(item, str) else _pair(item)
        more = large if name.startswith("apgd") else {}
        found.append(_one(name, {**more, **options}))
    return found


def _pair(item: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(item, Sequence) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], dict):
        return item[0], item[1]
    raise TypeError(f"version: got {ck.describe(item)} in the list, expected a name or (name, options)")


def _one(name: str, options: dict[str, Any]) -> Planned:
    if name not in _BASE:
        raise ValueError(f"version: got attack {name!r}, expected one of {', '.join(_BASE)}")
    attack, base = _BASE[name]
    unknown = sorted(set(options) - _OWN[attack])
    if unknown:
        raise ValueError(
            f"version: got {name} with {', '.join(unknown)}, expected of {', '.join(sorted(_OWN[attack]))}"
        )
    return Planned(name, attack, {**base, **options})


def _of_version(version: str, norm: float) -> list[tuple[str, dict[str, Any]]]:
    sparse = norm == 1
    large: dict[str, Any] = {"large_radii": True} if sparse else {}
    if version == "standard":
        return [
            ("apgd-ce", {"restarts": 5 if sparse else 1, **large}),
            ("apgd-t", {"targets": 5 if sparse else 9, **large}),
            ("fab-t", {}),
            ("square", {}),
        ]
    if version == "plus":
        return [
            ("apgd-ce", {"restarts": 5, **large}),
            ("apgd-dlr", {"restarts": 5, **large}),
            ("fab", {"restarts": 5}),
            ("square", {}),
            ("apgd-t", large),
            ("fab-t", {}),
        ]
    if version == "rand":
        return [("apgd-ce", {"eot_samples": 20, **large}), ("apgd-dlr", {"eot_samples": 20, **large})]
    return [("apgd-ce", {"steps": 50, **large}), ("apgd-malt", large)]


def fit_to_classes(attacks: list[Planned], classes: int) -> list[str]:
    """Fewer targets, and the margin in place of the DLR loss, where there are few classes; says what was changed."""
    notes = []
    for one in attacks:
        if classes < one.needs_classes:
            one.options["loss"] = "margin"
            notes.append(
                f"{one.name}: the DLR loss needs {one.needs_classes} classes, the model has {classes}; margin instead"
            )
        count = one.options.get("targets")
        if isinstance(count, int) and count > classes - 1:
            one.options["targets"] = classes - 1
            notes.append(f"{one.name}: {count} targets asked for, the model has {classes - 1} other classes")
    if notes:
        warn("few classes: " + "; ".join(notes))
    return notes
