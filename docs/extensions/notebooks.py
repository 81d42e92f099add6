# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The tutorials as notebooks, with the outputs of the build: ``_downloads/notebooks/NAME.ipynb``, linked beside the page.

Where the package can be installed from (``addresses.toml``), they begin with a cell that does so, and open in Colab.
"""

from functools import partial
from pathlib import Path

import addresses
import jax
import jupytext
import nbformat
import numpyro
from jupyter_cache import get_cache
from plain import citations, plain


def _executed(page, cache_folder, install, as_plain):
    """A page as a notebook, with the outputs in the cache; its kernel is named as there, by which the cache finds it.

    :param as_plain: makes text of the page text of a notebook.
    """
    text = page.read_text(encoding="utf-8").replace("\n  name: python3\n", "\n  name: python3\n  display_name: python3\n", 1)
    notebook = jupytext.reads(text, fmt="md:myst")
    if cache_folder is not None:
        _, notebook = get_cache(cache_folder).merge_match_into_notebook(notebook)
    notebook.cells = [cell for cell in notebook.cells if "remove-cell" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = as_plain(cell.source)
    if install:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(install, id="install"))
    return notebook


def _file(page):
    return f"_downloads/notebooks/{page.rpartition('/')[2]}.ipynb"


def _is_executed(app, page):
    return "```{code-cell}" in Path(app.env.doc2path(page)).read_text(encoding="utf-8")


def _write(app, exception):
    if exception is not None or app.builder.format != "html":
        return
    known = addresses.read(Path(app.srcdir))
    install = addresses.install(app.config.version, **known)
    site = known["site"] and f"{known['site']}{app.config.version}/"  # the pages of this release
    cited = citations(Path(app.srcdir) / "references.bib")
    cache_folder = None if app.config.nb_execution_mode == "off" else Path(app.config.nb_execution_cache_path)
    for page in sorted(app.env.found_docs):
        if page.startswith(("tutorials/", "get_started/")) and _is_executed(app, page):
            path = Path(app.outdir) / _file(page)
            path.parent.mkdir(parents=True, exist_ok=True)
            as_plain = partial(plain, page=page, site=site, cited=cited)
            nbformat.write(_executed(Path(app.env.doc2path(page)), cache_folder, install, as_plain), path)


def _link(app, page, template, context, doctree):
    if page.startswith(("tutorials/", "get_started/")) and page in app.env.found_docs and _is_executed(app, page):
        context["notebook"] = _file(page)
        context["colab"] = addresses.colab(_file(page), app.config.version, **addresses.read(Path(app.srcdir)))
    context |= {"numpyro_version": numpyro.__version__, "jax_version": jax.__version__}


def setup(app):
    app.connect("html-page-context", _link)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
