# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration. Pages with code cells are executed; an error in one fails the build, as does an undocumented symbol."""

import inspect
import os
import re
import sys
from functools import reduce
from pathlib import Path

import jaxlib.version
from sphinx.errors import SphinxError

import numpyro_ebm
import numpyro_ebm.samplers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))
import addresses  # noqa: E402
import inventories  # noqa: E402

project = "numpyro_ebm"
author = "The numpyro_ebm contributors"
project_copyright = author
release = version = numpyro_ebm.__version__
found_at = addresses.read(HERE)

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",  # the directive of the docstrings' examples; pytest runs them
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
    # docs/extensions
    "addresses",
    "formulas",
    "symbols",
    "notebooks",
    "llms",
]
exclude_patterns = [
    "_build",
    "gallery/scripts/*.ipynb",
    "gallery/scripts/*.py",
    "gallery/scripts/index.rst",
    "sg_execution_times.rst",
]
suppress_warnings = ["config.cache"]  # settings that are functions or classes are not kept between builds
templates_path = ["_templates"]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
trim_doctest_flags = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Code cells. Pages without one are not executed.
nb_execution_mode = os.environ.get("DOCS_EXECUTION", "cache")  # "off": a quick look at text and layout
if nb_execution_mode == "off":
    suppress_warnings.append("myst-nb.lexer")  # the language of cells is known once they have been executed
nb_execution_cache_path = str(HERE / "_build" / "cells")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_number_source_lines = False
if jaxlib.version.__version_info__ < (0, 11):  # most pages compile longer than they run; later versions do not know both
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"
os.environ.update(
    JAX_PLATFORMS="cpu",
    MATPLOTLIBRC=str(HERE / "matplotlibrc"),  # transparent figures, in colors for light and dark pages
    IPYTHONDIR=str(HERE / "ipython"),
    PYTHONHASHSEED="0",
    JAX_COMPILATION_CACHE_DIR=str(HERE / "_build" / "xla"),  # pages share small programs
    TF_CPP_MIN_LOG_LEVEL="3",  # JAX 0.10.1 complains of every program that it reads from there
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    PYTHONWARNINGS="ignore:IProgress not found",  # tqdm's, about widgets; nothing on a page has a progress bar
)

# The API: a page for every symbol.
autosummary_generate = True
autosummary_context = {
    "engines": ["ParticleMMLE", "ScoreMatching", "BiSM", "VaGES", "BiDVL"],
    "without_members": ["RBFKernel", "IMQKernel"],
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
intersphinx_mapping = inventories.mapping(HERE)
bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "unsrt"
bibtex_reference_style = "author_year"

# The gallery shows the scripts, and does not run them: each takes minutes or hours.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery/scripts",
    "filename_pattern": r"^$",
    "ignore_pattern": r"nets/|__init__",
    "plot_gallery": False,
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "doc_module": ("numpyro_ebm",),
    "backreferences_dir": "gallery/uses",
    "inspect_global_variables": False,
    "remove_config_comments": True,
    "default_thumb_file": str(HERE / "_static" / "logo" / "thumbnail.png"),
    "copyfile_regex": r".*\.rst",
}

html_math_renderer = "katex"
html_theme = "pydata_sphinx_theme"
html_title = "numpyro_ebm"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_favicon = "_static/logo/favicon.svg"
html_baseurl = found_at["site"]
html_show_sourcelink = False
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}
html_sidebars = {"index": [], "gallery/scripts/*": []}  # a script has lines of 132 characters, and needs the width
html_theme_options = {
    "logo": {
        "text": "numpyro_ebm",
        "image_light": "_static/logo/logo.svg",
        "image_dark": "_static/logo/logo_dark.svg",
    },
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_prev_next": True,
    "show_toc_level": 2,
    "show_nav_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc", "notebook"], "index": []},
    "footer_start": ["copyright"],
    "footer_end": ["versions"],
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
    **addresses.theme_options(version, **found_at),
}


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
    listed = re.findall(r"^   ([\w.]+)$", (Path(app.srcdir) / "api" / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    on_page = [reduce(getattr, name.split("."), numpyro_ebm) for name in listed]
    problems = []
    for path, symbol in _public():
        if not any(symbol is shown for shown in on_page):
            problems.append(f"{path} is not in docs/api/index.md")
        if not _has_own_docstring(symbol):
            problems.append(f"{path} has no docstring")
        if inspect.isclass(symbol):
            problems += [f"{path}.{name} has no docstring" for name, member in _own_methods(symbol) if not inspect.getdoc(member)]
    if problems:
        raise SphinxError("undocumented public symbols: " + "; ".join(sorted(set(problems))))


def setup(app):
    app.connect("builder-inited", _require_documented)
