"""The stub of the compiled module names what the module has, with as many arguments, those with defaults included."""

import ast
import re
from pathlib import Path

import pytest

import fastrobust
from fastrobust import _C

STUB = ast.parse((Path(fastrobust.__file__).parent / "_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
ANNOTATED = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
VALUES = {name for name in ANNOTATED if not name.startswith("_") or name == "__version__"}
SIGNATURE = re.compile(r"^\w+\((.*)\) -> ")


def told(entry):
    """The arguments in pybind11's account of a function: [(name, whether it has a default)], without self."""
    found = SIGNATURE.match(entry.__doc__.splitlines()[0])
    assert found, entry.__doc__
    parts, depth, start, text = [], 0, 0, found[1]
    for i, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    names = [(part.split(":")[0].strip(), " = " in part) for part in parts if part.strip()]
    return [pair for pair in names if pair[0] not in ("self", "/")]


def written(node):
    """The same of the stub, and whether the arguments have keywords."""
    args = [*node.args.posonlyargs, *node.args.args]
    without = len(args) - len(node.args.defaults)
    pairs = [(a.arg, i >= without) for i, a in enumerate(args)]
    return [pair for pair in pairs if pair[0] != "self"], not node.args.posonlyargs


def compare(name, entry, node):
    module, (stub, keywords) = told(entry), written(node)
    assert len(stub) == len(module), f"{name}: the stub has {len(stub)} arguments, the module {len(module)}"
    assert [default for _, default in stub] == [default for _, default in module], name
    positional = all(re.fullmatch(r"arg\d+", argument) for argument, _ in module)
    if module and not positional:  # bound with names: the stub has the same
        assert keywords and [a for a, _ in stub] == [a for a, _ in module], name
    elif module:
        assert not keywords, f"{name}: the stub allows keywords, the module has none"


def test_the_stub_names_what_the_module_has():
    have = {name for name in dir(_C) if not name.startswith("__")} | {"__version__"}
    assert have == FUNCTIONS.keys() | CLASSES.keys() | VALUES
    assert all(isinstance(getattr(_C, name), (str, int)) for name in VALUES)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_have_the_arguments_of_the_stub(name):
    compare(name, getattr(_C, name), FUNCTIONS[name])
    assert FUNCTIONS[name].returns is not None
    assert all(a.annotation is not None for a in [*FUNCTIONS[name].args.posonlyargs, *FUNCTIONS[name].args.args])


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes_have_the_methods_and_properties_of_the_stub(name):
    made = getattr(_C, name)
    methods = [node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)]
    plain = [node for node in methods if not node.decorator_list]
    for node in plain:
        compare(f"{name}.{node.name}", getattr(made, node.name), node)
    values = {node.target.id for node in CLASSES[name].body if isinstance(node, ast.AnnAssign)}
    have = {member for member in dir(made) if not member.startswith("_")}
    assert have == {node.name for node in methods if node.name != "__init__"} | values


def test_entries_are_in_the_order_of_the_alphabet_within_their_family():
    text = (Path(fastrobust.__file__).parent / "_C.pyi").read_text()
    families = re.split(r"(?m)^# -- (\w[\w ]*?) -+$", text)
    assert families[1::2] == ["the module", "pgd", "polyhedron", "store", "bounds", "binary"]
    for family, part in zip(families[1::2], families[2::2], strict=True):
        names = re.findall(r"(?m)^def (\w+)", part)
        assert names == sorted(names), family
