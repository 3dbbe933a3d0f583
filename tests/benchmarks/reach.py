"""How far the tests reach into private parts of `batch`: `python -m tests.benchmarks.reach [--where]`.

It prints two counts for each file under tests/ and in all:

- private: uses of a name of `batch` with one leading underscore. `x._name` counts where some module of `batch` gives
  that name to anything, unless x is `self`, `cls`, `super()` or of a library; `from batch.x import _name` counts.
- replaced: a value of the test's own in the place of one of `batch`: `monkeypatch.setattr` of a module or class that
  is imported from there, or of "batch.module.NAME", and an assignment to an attribute of one.

`--where` prints each place too.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "batch"
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in OF_NAMED_TUPLES


def names_given(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives to functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def imported(tree: ast.AST) -> set[str]:
    """Names under which a test has something of `batch`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "batch":
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            of_batch = [alias for alias in node.names if alias.name.split(".")[0] == "batch"]
            found |= {alias.asname or "batch" for alias in of_batch}
    return found


def root(node: ast.AST) -> ast.AST:
    """`a` of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


def is_of_batch(target: ast.AST, names: set[str]) -> bool:
    if isinstance(target, ast.Constant):
        return str(target.value).startswith("batch.")
    base = root(target)
    return isinstance(base, ast.Name) and base.id in names


def uses(tree: ast.AST, known: set[str]) -> Iterator[ast.AST]:
    """Private names of `batch` that a test uses."""
    modules = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names if alias.name.split(".")[0] != "batch"}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr in known:
            base, first = node.value, root(node)
            is_own = isinstance(first, ast.Name) and first.id in modules
            is_own = is_own or (isinstance(base, ast.Name) and base.id in {"self", "cls"})
            is_super = isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "super"
            if not is_own and not is_super:
                yield node
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "batch":
            yield from (node for alias in node.names if is_private(alias.name))


def replacements(tree: ast.AST) -> Iterator[ast.AST]:
    """Values of a test's own in the place of one of `batch`."""
    names = imported(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="setattr"), args=[target, *_]) if is_of_batch(target, names):
                yield node
            case ast.Assign(targets=targets):
                of_batch = [one for one in targets if isinstance(one, ast.Attribute) and is_of_batch(one, names)]
                yield from (node for _ in of_batch)


def main() -> None:
    known = {name for path in PACKAGE.rglob("*.py") for name in names_given(ast.parse(path.read_text()))}
    counts = {"private": Counter[str](), "replaced": Counter[str]()}
    for path in sorted(TESTS.rglob("*.py")):
        tree, name = ast.parse(path.read_text()), str(path.relative_to(TESTS.parent))
        for what, found in (("private", uses(tree, known)), ("replaced", replacements(tree))):
            for node in sorted(found, key=lambda node: node.lineno):
                counts[what][name] += 1
                if "--where" in sys.argv:
                    print(f"{name}:{node.lineno}: {what}: {ast.unparse(node)[:90]}")
    print("private  replaced")
    for name in sorted(counts["private"] | counts["replaced"]):
        print(f"{counts['private'][name]:>7}  {counts['replaced'][name]:>8}  {name}")
    print(f"{counts['private'].total():>7}  {counts['replaced'].total():>8}  in all")


if __name__ == "__main__":
    main()
