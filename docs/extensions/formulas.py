# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Formulas become HTML when the pages are built, so that the pages need no script and no network.

KaTeX (``_static/katex``: script, style sheet and fonts of its npm package, version 0.19.1) runs in an embedded JavaScript
engine. It refuses what it does not know, so a misspelled command fails the build instead of looking odd.
"""

import re
from pathlib import Path

import dukpy
from docutils import nodes
from sphinx.util import logging

_KATEX = "katex/katex.min"  # under _static
_engine = dukpy.JSInterpreter()
_engine.evaljs((Path(__file__).parents[1] / "_static" / f"{_KATEX}.js").read_text(encoding="utf-8") + "; null")


def render(tex, display=False):
    """HTML of a formula, with the MathML that screen readers read; ``ValueError`` for TeX that KaTeX does not know."""
    if display and r"\\" in tex:  # Sphinx's convention: the lines of one formula, aligned at their &
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    options = {"displayMode": display, "throwOnError": True, "strict": "error"}
    try:
        return _engine.evaljs("katex.renderToString(dukpy.tex, dukpy.options)", tex=tex, options=options)
    except dukpy.JSRuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None  # the other lines are positions in KaTeX's script


def _append(writer, node, before, display, after):
    try:
        writer.body.append(before + render(node.astext() + node.get("closing", ""), display) + after)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s", error, location=node)
    raise nodes.SkipNode


def _keep_punctuation(app, doctree, docname):
    """A browser may break the line between a formula and the comma after it: the comma becomes a part of the formula."""
    for node in list(doctree.findall(nodes.math)) if app.builder.format == "html" else ():
        after = node.next_node(descend=False, siblings=True)
        found = re.match(r"[.,;:)?!]+", after) if isinstance(after, nodes.Text) else None
        if found:
            node["closing"] = rf"\text{{{found[0]}}}"
            after.parent.replace(after, nodes.Text(after[found.end() :]))


def _inline(writer, node):
    _append(writer, node, '<span class="math">', False, "</span>")


def _displayed(writer, node):
    # on a phone the formula scrolls, not the page
    _append(writer, node, '<div class="math" style="overflow-x: auto; overflow-y: hidden">', True, "</div>\n")


def setup(app):
    app.add_html_math_renderer("katex", inline_renderers=(_inline, None), block_renderers=(_displayed, None))
    app.add_css_file(f"{_KATEX}.css")
    app.connect("doctree-resolved", _keep_punctuation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
