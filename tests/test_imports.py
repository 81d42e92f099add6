# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import numpyro_ebm

PACKAGE = Path(numpyro_ebm.__file__).parent
FLOORS = {
    "_checks": 0,
    "_compat": 0,
    "_fit": 0,
    "_jaxlib": 0,
    "_map_over": 0,
    "_precision": 0,
    "_pytree": 0,
    "_conjugate_gradient": 0.5,
    "_compiled": 0.5,
    "weights": 0,
    "datasets": 0,
    "samplers": 1,
    "weighted": 2,
    "optim": 1,
    "distributions": 2,
    "program": 3,
    "chains": 4,
    "chain_moves": 4.5,
    "handlers": 5,
    "objectives": 6,
    "evaluate": 7,
    "train": 7.5,
    "infer": 8,
    "inference_data": 9,
}


def _floor(module):
    """The part of the package that a dotted module name lies in, or None for another package and for the root."""
    parts = module.split(".")
    return parts[1] if parts[0] == "numpyro_ebm" and len(parts) > 1 else None


def _imports(path):
    """Every (module, imported names) of a source file, imports inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, [alias.name for alias in node.names]


def _modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_import_loads_no_optional_or_slow_package():
    # Catches a top-level import of BlackJAX or ArviZ (slow) or of a package that only an extra installs.
    script = "import json, sys, numpyro_ebm; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "numpyro" in loaded
    assert not loaded & {"blackjax", "arviz", "matplotlib", "xarray", "equinox", "flax"}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    # Catches a lower floor that reaches up (a circle sooner or later), and a floor nobody placed.
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for module, names in _imports(path):
        targets = [_floor(module)] if _floor(module) else [name for name in names if module == "numpyro_ebm"]
        for target in targets:
            assert target in FLOORS, f"{path.name} imports {target} of numpyro_ebm: name it in FLOORS, or import from its file"
            assert target == own or FLOORS[target] < FLOORS[own], f"{own} imports {target}, which is not below it"


def test_no_circle_within_a_layer():
    # Catches two files of one folder that need each other: neither can be read, tested or moved alone.
    files = [(path, path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in _modules()]
    names = {".".join(parts).removesuffix(".__init__"): path for path, parts in files}
    needs = {name: {module for module, _ in _imports(path)} & names.keys() for name, path in names.items()}
    while free := [name for name, below in needs.items() if not below]:
        needs = {name: below.difference(free) for name, below in needs.items() if below}
    assert not needs, f"these files import each other in a circle: {sorted(needs)}"


def test_public_names_stay_out_of_the_package():
    # Catches a module that imports from the package's root, which makes every import a circle.
    for path in _modules():
        assert all(module != "numpyro_ebm" for module, _ in _imports(path)), path


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_numpyro_names_are_imported_in_compat_only(path):
    # Catches a private NumPyro name that spreads: a NumPyro release must break one file at most.
    if path.name == "_compat.py":
        return
    for module, names in _imports(path):
        if module.split(".")[0] == "numpyro":
            private = [part for part in (*module.split("."), *names) if part.startswith("_")]
            assert not private, f"{path.name} imports {private} from {module}: take it through _compat.py"


# What NumPyro keeps in its messages and objects and does not document.
PRIVATE = {"_control_flow_done", "_scan_current_index", "_mask", "is_auxiliary", "prototype_trace", "_PYRO_STACK", "_getframe"}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_keys_and_attributes_of_numpyro_are_read_in_compat_only(path):
    # Catches the same by key or attribute, which no import shows.
    if path.name == "_compat.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        used = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
        assert used not in PRIVATE, f"{path.name}, line {node.lineno}: take {used} through a function of _compat.py"


@pytest.mark.parametrize("name", numpyro_ebm.__all__)
def test_public_name_has_a_docstring_of_its_own(name):
    # Catches a public class that shows its parent's docstring, and a public method without any.
    public = getattr(numpyro_ebm, name)
    assert vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    for attribute, member in vars(public).items() if inspect.isclass(public) else ():
        if not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(getattr(public, attribute)) or _is_override(public, attribute), f"{name}.{attribute}"


def _is_override(public, attribute):
    return any(hasattr(base, attribute) for base in public.__mro__[1:])


def test_every_public_name_has_a_place_in_the_api():
    # Catches a name without an entry in a second, where building the documentation takes a minute.
    page = PACKAGE.parent / "docs" / "api" / "index.md"
    if not page.exists():
        pytest.skip("the package is installed without its source tree")
    listed = set(re.findall(r"^   ([\w.]+)$", page.read_text(), re.MULTILINE))
    assert set(numpyro_ebm.__all__) <= listed


def test_every_public_name_exists_once():
    # Catches a public name that was renamed in its file and not in __all__, or listed twice.
    assert len(set(numpyro_ebm.__all__)) == len(numpyro_ebm.__all__)
    assert all(hasattr(numpyro_ebm, name) for name in numpyro_ebm.__all__)


def test_version_is_that_of_pyproject():
    # Catches a release with two version numbers.
    pyproject = PACKAGE.parent / "pyproject.toml"
    if not pyproject.exists():
        pytest.skip("the package is installed without its source tree")
    assert numpyro_ebm.__version__ == tomllib.loads(pyproject.read_text())["project"]["version"]
