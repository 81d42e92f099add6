# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Every formula of the pages and of the docstrings is TeX that the documentation's renderer knows, and shows what it says."""

import ast
import re
import runpy
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from docutils import nodes

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md")))]
SOURCES = [str(p.relative_to(ROOT)) for folder in ("numpyro_ebm", "examples") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def render():
    return runpy.run_path(str(ROOT / "docs" / "extensions" / "formulas.py"))["render"]


def page_formulas(text):
    """What is between dollars, outside of code: ``(TeX, whether displayed)``."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for match in re.finditer(r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+)\$", text, re.DOTALL):
        yield match[1] or match[2], match[1] is not None


def docstring_formulas(source):
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(source)):
        text = (isinstance(node, documented) and ast.get_docstring(node)) or ""
        for match in re.finditer(r":math:`([^`]+)`", text):
            yield match[1], False
        for match in re.finditer(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *))*)", text, re.MULTILINE):
            yield textwrap.dedent(match[2]).strip(), True


def problem(render, tex, display):
    name = re.search(r"(?<![\\a-zA-Z])(log|exp|max|min|sin|cos|tanh?|det|sup|inf)\b", re.sub(r"\\text\{[^}]*\}", "", tex))
    if name:
        return f"a product of letters: \\{name[0]}"
    try:
        render(tex, display)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("paths", "formulas"), [(PAGES, page_formulas), (SOURCES, docstring_formulas)], ids=["pages", "docstrings"]
)
def test_formulas_are_known_to_the_renderer(render, paths, formulas):
    # an unknown command, a brace or a \left without its partner, a letter that has no glyph, "log" without its backslash
    found = [(path, tex, display) for path in paths for tex, display in formulas((ROOT / path).read_text(encoding="utf-8"))]
    assert len(found) > 100  # a collector that finds nothing would pass everything
    assert {display for _, _, display in found} == {True, False}
    assert [(path, tex, why) for path, tex, display in found if (why := problem(render, tex, display))] == []


@pytest.mark.parametrize(
    ("tex", "mathml"),
    [
        (r"\tfrac12 x", "<mfrac><mn>1</mn><mn>2</mn></mfrac></mstyle><mi>x</mi>"),
        (r"\hat p_L", '<msub><mover accent="true"><mi>p</mi><mo>^</mo></mover><mi>L</mi></msub>'),
        (r"\{0, 1\}^m", '<msup><mo stretchy="false">}</mo><mi>m</mi></msup>'),
        (r"\lVert s \rVert^2", '<mo stretchy="false">∥</mo><mi>s</mi><msup><mo stretchy="false">∥</mo><mn>2</mn></msup>'),
        (r"\text{latent\_weight}", "<mtext>latent_weight</mtext>"),
        (r"h = .05", "<mn>.05</mn>"),
    ],
)
def test_formulas_show_what_they_say(render, tex, mathml):
    # docutils' own converter shows 12 over x, hangs the index under the accent, draws delimiters of two sizes, and a backslash
    assert mathml in render(tex)


def test_lines_of_a_displayed_formula_are_aligned(render):
    assert "<mtable" in render("a &= b \\\\\n&= c", display=True)


def test_misspelled_commands_are_refused(render):
    with pytest.raises(ValueError, match="Undefined control sequence"):
        render(r"\tfarc12 x")


@pytest.mark.parametrize(
    ("after", "closing", "rest"), [(", also", r"\text{,}", " also"), (").", r"\text{).}", ""), (" is", "", " is")]
)
def test_no_line_begins_with_the_comma_of_a_formula(after, closing, rest):
    # A browser may break the line behind a formula; it does not break inside one at its end.
    keep = runpy.run_path(str(ROOT / "docs" / "extensions" / "formulas.py"))["_keep_punctuation"]
    paragraph = nodes.paragraph("", "", nodes.math("Z", "Z"), nodes.Text(after))
    keep(SimpleNamespace(builder=SimpleNamespace(format="html")), paragraph, "page")
    formula, text = paragraph.children
    assert (formula.get("closing", ""), text) == (closing, rest)
