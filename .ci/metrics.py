# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""How the code is built, in numbers: sizes, scatter, signatures, and how deep the user's model lies under ``update``.

``make metrics`` prints a table for this package beside installed ones that it is measured against. Docstrings are not counted as
lines. A function is one at the top level of a file or of a class; private is a name with a leading underscore that is no dunder.
The frames are those of this package between a call of ``update`` and the user's model, for each engine, the deepest of them.
"""

import ast
import importlib.util
import statistics
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PEERS = ("optax", "blackjax", "numpyro")
MAX_FUNCTION, MAX_PARAMETERS = 40, 11


class Function(NamedTuple):
    """One of the functions that are counted."""

    file: str
    name: str
    node: ast.FunctionDef | ast.ClassDef
    lines: int
    num_parameters: int

    @property
    def is_private(self) -> bool:
        last = self.name.split(".")[-1]
        return last.startswith("_") and not last.startswith("__")

    @property
    def is_public(self) -> bool:
        return not any(part.startswith("_") and part != "__init__" for part in self.name.split("."))


def docstring_lines(node: Any) -> int:
    """Lines of the docstring of a file, class or function."""
    first = node.body[0] if node.body else None
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return first.end_lineno - first.lineno + 1 if is_text else 0


def code_lines(source: str, tree: ast.Module) -> int:
    """Lines of a file that are neither empty nor docstrings."""
    documented = sum(
        docstring_lines(node) for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    return len(source.splitlines()) - documented


def parameters(node: ast.FunctionDef) -> int:
    """How many a caller may give, those of ``*args`` and ``**kwargs`` left out."""
    args = node.args
    named = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    return len([arg for arg in named if arg.arg not in ("self", "cls")])


def fields(node: ast.ClassDef) -> int:
    """Parameters of a dataclass, which has one for each field."""
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    found = [item for item in node.body if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation)]
    return len(found) if is_dataclass else 0


def functions(file: str, tree: ast.Module) -> Iterator[Function]:
    """Functions and methods of a file, nested ones left out."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield function(file, node.name, node)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield function(file, f"{node.name}.{inner.name}", inner)


def function(file: str, name: str, node: ast.FunctionDef) -> Function:
    """One of them, measured."""
    return Function(file, name, node, node.end_lineno - node.lineno + 1 - docstring_lines(node), parameters(node))


def measure(folder: Path) -> dict[str, Any]:
    """The numbers of all files in a folder."""
    files, found, longest_signatures, getattrs = {}, [], {}, 0
    for path in sorted(folder.rglob("*.py")):
        source = path.read_text()
        tree, name = ast.parse(source), str(path.relative_to(folder))
        files[name] = code_lines(source, tree)
        found += functions(name, tree)
        longest_signatures |= {
            f"{name}: {node.name}": fields(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"
        }
        calls = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        getattrs += sum(call in ("getattr", "hasattr", "setattr") for call in calls)
    longest_signatures |= {f"{each.file}: {each.name}": each.num_parameters for each in found if each.is_public}
    total, lines = sum(files.values()), sorted(each.lines for each in found)
    public = [each for each in found if each.is_public]
    return {
        "files": len(files),
        "lines": total,
        "lines of the longest file": max(files.values()),
        "functions": len(found),
        "lines of a function, median": statistics.median(lines),
        "lines of a function, 90 %": lines[int(0.9 * len(lines))],
        "lines of a function, longest": lines[-1],
        f"functions over {MAX_FUNCTION} lines, %": 100 * sum(n > MAX_FUNCTION for n in lines) / len(lines),
        "public functions with docstrings, %": 100 * sum(docstring_lines(each.node) > 0 for each in public) / len(public),
        "private functions per 1,000 lines": 1000 * sum(each.is_private for each in found) / total,
        "getattr, hasattr, setattr": getattrs,
        "getattr, hasattr, setattr per 1,000 lines": 1000 * getattrs / total,
        "parameters of a public callable, most": max(longest_signatures.values()),
        "long files": {name: n for name, n in files.items() if n > 520},
        "long signatures": {name: n for name, n in longest_signatures.items() if n > MAX_PARAMETERS},
    }


def frames_to_the_model(package: Path) -> dict[str, int]:
    """Frames of the package between ``update`` of an engine and the user's model, by engine."""
    sys.path.insert(0, str(package.parent / "tests"))
    from test_engine_contract import CASES, KEY

    found: dict[str, int] = {}

    def watching(name: str) -> Any:
        def watch(model: Any) -> Any:
            def watched(*args: Any, **kwargs: Any) -> Any:
                stack = [frame.filename for frame in traceback.extract_stack()]
                found[name] = max(found.get(name, 0), sum(filename.startswith(str(package)) for filename in stack))
                return model(*args, **kwargs)

            return watched

        return watch

    for name, case in CASES.items():
        engine = case.make(watching(name))
        state = engine.init(KEY, *case.args)
        found.pop(name)  # of init, where all is checked
        engine.update(state, *case.args)
    return found


def main() -> None:
    """Prints the table."""
    package = Path(__file__).parents[1] / "numpyro_ebm"
    folders = {"numpyro_ebm": package}
    for name in PEERS:
        if (spec := importlib.util.find_spec(name)) and spec.origin:
            folders[name] = Path(spec.origin).parent
    measured = {name: measure(folder) for name, folder in folders.items()}
    print(f"{'':<44}" + "".join(f"{name:>14}" for name in measured))
    for metric, value in measured["numpyro_ebm"].items():
        if not isinstance(value, dict):
            print(f"{metric:<44}" + "".join(f"{each[metric]:>14.4g}" for each in measured.values()))
    for metric in ("long files", "long signatures"):
        print(f"{metric}: {measured['numpyro_ebm'][metric] or 'none'}")
    print("frames between update and the model:", frames_to_the_model(package))


if __name__ == "__main__":
    main()
