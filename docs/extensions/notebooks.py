# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The tutorials as notebooks, with the outputs of the build: ``_downloads/notebooks/NAME.ipynb``, linked beside the page."""

from pathlib import Path

import jax
import jupytext
import nbformat
import numpyro
from jupyter_cache import get_cache


def _executed(page, cache_folder):
    """A page as a notebook, with the outputs in the cache; its kernel is named as there, by which the cache finds it."""
    text = page.read_text(encoding="utf-8").replace("\n  name: python3\n", "\n  name: python3\n  display_name: python3\n", 1)
    notebook = jupytext.reads(text, fmt="md:myst")
    if cache_folder is not None:
        _, notebook = get_cache(cache_folder).merge_match_into_notebook(notebook)
    notebook.cells = [cell for cell in notebook.cells if "remove-cell" not in cell.metadata.get("tags", [])]
    return notebook


def _is_executed(app, page):
    return "```{code-cell}" in Path(app.env.doc2path(page)).read_text(encoding="utf-8")


def _write(app, exception):
    if exception is not None or app.builder.format != "html":
        return
    folder = Path(app.outdir) / "_downloads" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    cache_folder = None if app.config.nb_execution_mode == "off" else Path(app.config.nb_execution_cache_path)
    for page in sorted(app.env.found_docs):
        if page.startswith(("tutorials/", "get_started/")) and _is_executed(app, page):
            notebook = _executed(Path(app.env.doc2path(page)), cache_folder)
            nbformat.write(notebook, folder / f"{page.rpartition('/')[2]}.ipynb")


def _link(app, page, template, context, doctree):
    if page.startswith(("tutorials/", "get_started/")) and page in app.env.found_docs and _is_executed(app, page):
        context["notebook"] = f"_downloads/notebooks/{page.rpartition('/')[2]}.ipynb"
    context |= {"numpyro_version": numpyro.__version__, "jax_version": jax.__version__}


def setup(app):
    app.connect("html-page-context", _link)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
