# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration. It also fails the build when a public symbol is undocumented."""

import inspect
import re
import sys
from functools import reduce
from pathlib import Path

from sphinx.errors import SphinxError

import numpyro_ebm
import numpyro_ebm.samplers

project = "numpyro_ebm"
author = "The numpyro_ebm contributors"
project_copyright = author
release = version = numpyro_ebm.__version__

sys.path.insert(0, str(Path(__file__).parent))  # formulas.py
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",  # the directive of the docstrings' examples; pytest runs them
    "sphinx_copybutton",
    "formulas",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
trim_doctest_flags = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types in words
add_module_names = False
python_use_unqualified_type_names = True

html_math_renderer = "katex"
html_theme = "furo"
html_title = "numpyro_ebm"
html_static_path = ["_static"]


def _public():
    yield from ((f"numpyro_ebm.{name}", getattr(numpyro_ebm, name)) for name in numpyro_ebm.__all__)
    for module in (numpyro_ebm.infer, numpyro_ebm.samplers):  # where names stay that are not at the root
        for name, symbol in vars(module).items():
            if not name.startswith("_") and not inspect.ismodule(symbol):
                yield f"{module.__name__}.{name}", symbol


def _has_own_docstring(symbol):
    doc = inspect.getdoc(symbol) or ""
    # a dataclass or a named tuple without a docstring gets its signature for one
    return bool(doc) and not doc.startswith(f"{symbol.__name__}(")


def _own_methods(cls):
    """The public methods and properties that this package adds, overrides of other packages' methods left out."""
    foreign = {name for base in cls.__mro__ if not base.__module__.startswith("numpyro_ebm") for name in vars(base)}
    return [
        (name, member)
        for name, member in vars(cls).items()
        if not name.startswith("_") and name not in foreign and (callable(member) or isinstance(member, property))
    ]


def _require_documented(app):
    listed = re.findall(r"^\.\. auto\w+:: ([\w.]+)$", (Path(app.srcdir) / "api.md").read_text(), re.MULTILINE)
    on_page = [reduce(getattr, name.split(".")[1:], numpyro_ebm) for name in listed]
    problems = []
    for path, symbol in _public():
        if not any(symbol is shown for shown in on_page):
            problems.append(f"{path} is not in docs/api.md")
        if not _has_own_docstring(symbol):
            problems.append(f"{path} has no docstring")
        if inspect.isclass(symbol):
            problems += [f"{path}.{name} has no docstring" for name, member in _own_methods(symbol) if not inspect.getdoc(member)]
    if problems:
        raise SphinxError("undocumented public symbols: " + "; ".join(sorted(set(problems))))


def setup(app):
    app.connect("builder-inited", _require_documented)
