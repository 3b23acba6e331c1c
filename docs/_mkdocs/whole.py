"""What the package makes public, from its source alone, and whether the built reference has it all:
`python docs/_mkdocs/whole.py build/docs/objects.inv`."""

from __future__ import annotations

import ast
import sys
import zlib
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python" / "fastrobust"


def contents(module: str) -> tuple[dict[str, str], list[str]]:
    """(dotted place of each name, submodules) of the `__all__` of a module. A function in a file of its own name, which
    readers of source take for the file, is placed there."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    body = ast.parse((place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()).body
    listed: list[str] = []
    objects = set()
    for node in body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            values = node.value.elts if isinstance(node.value, ast.List) else []  # griffe reads those that are computed
            listed = [str(v.value) for v in values if isinstance(v, ast.Constant)]
        elif isinstance(node, ast.ImportFrom) and node.module not in (None, module):
            objects |= {alias.asname or alias.name for alias in node.names}
    files = {n for n in listed if (place / n).is_dir() or (place / f"{n}.py").exists()}
    names = {
        n: f"{module}.{n}.{n}" if n in files else f"{module}.{n}"
        for n in listed
        if not n.startswith("__") and (n in objects or n not in files)
    }
    return names, [n for n in listed if n in files and n not in objects]


def modules(module: str) -> list[str]:
    """A module and its public submodules, from the top."""
    return [module, *(m for name in contents(module)[1] for m in modules(f"{module}.{name}"))]


def main() -> int:
    inventory = Path(sys.argv[1]).read_bytes().split(b"\n", 4)[4]
    shown = {line.split(" ", 1)[0] for line in zlib.decompress(inventory).decode().splitlines()}
    wanted = [place for module in modules("fastrobust") for place in contents(module)[0].values()]
    missing = sorted(set(wanted) - shown)
    for name in missing:
        print(f"not in the reference: {name}", file=sys.stderr)
    print(f"{len(wanted) - len(missing)} of {len(wanted)} public names in the reference")
    return int(bool(missing) or len(wanted) < 200)


if __name__ == "__main__":
    sys.exit(main())
