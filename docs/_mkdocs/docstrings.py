"""What mkdocstrings reads: the docstrings' formulas as MathML, their roles as code, one indentation for what is
raised."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_MATH = re.compile(r"^( *)\.\. math:: *(.*(?:\n(?:\1 +\S.*))*)", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`[~.]*([^`]*)`")
_RAISED = re.compile(r"^\w+(, \w+)*: ")


def as_markdown(text: str) -> str:
    """The docstring with what Markdown does not know written in what it does."""
    text = _MATH.sub(lambda m: m[1] + convert(" ".join(m[2].split()), display="block"), text)
    text = _ROLE.sub(r"`\1`", text)
    lines, raised = [], False
    for line in text.splitlines():
        if line.strip().endswith(":") and not line.startswith(" "):
            raised = line.startswith("Raises:")
        elif raised and line.startswith("    ") and not _RAISED.match(line.strip()):
            line = "    " + line  # a sentence that goes on
        lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
