# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The documentation's parts fit together: what can be told without building it."""

import re
import runpy
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import numpyro_ebm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "scripts"} & set(path.parts))
TREES = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fenced(text):
    """``(language, code)`` of every block that a page shows."""
    found = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(kind, code) for kind, code in found if "[remove-cell]" not in code.partition("\n")[0]]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_code_of_a_page_can_be_read_without_scrolling(page):
    # 88 characters are what the column holds.
    kinds = ("python", "{code-cell}", "bash")
    lines = [line for kind, code in fenced(page.read_text(encoding="utf-8")) if kind in kinds for line in code.splitlines()]
    assert [line for line in lines if len(line) > 88 and not line.startswith(":")] == []


def test_every_page_is_in_the_contents():
    # Catches a page that only its address finds.
    listed = set()
    for page in PAGES:
        for tree in TREES.findall(page.read_text(encoding="utf-8")):
            names = [line.strip() for line in tree.splitlines() if line.strip() and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert [str(page.relative_to(DOCS)) for page in PAGES if page.resolve() not in listed] == ["index.md"]


def test_every_script_is_in_the_gallery():
    text = (DOCS / "gallery" / "index.md").read_text(encoding="utf-8")
    assert [path.stem for path in sorted((ROOT / "examples").glob("*.py")) if f"scripts/{path.stem}" not in text] == []


def test_every_picture_is_on_a_page():
    # Catches pictures that nobody sees, and that a change of the scripts leaves behind.
    sources = [*PAGES, ROOT / "README.md", *(ROOT / "examples").glob("*.py"), DOCS / "conf.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert [path.name for path in sorted((DOCS / "_static").glob("*.png")) if f"_static/{path.name}" not in text] == []


def test_addresses_of_other_packages_are_those_of_their_objects():
    """Catches a name that NumPyro, JAX or optax have moved: a link to nowhere."""
    sys.path.insert(0, str(DOCS / "extensions"))
    try:
        symbols = runpy.run_path(str(DOCS / "extensions" / "inventories.py"))["foreign_symbols"](DOCS)
    finally:
        sys.path.remove(str(DOCS / "extensions"))
    dotted = [name for name in symbols if "." in name]
    assert len(dotted) > 50
    for name in dotted:
        module, _, symbol = name.rpartition(".")
        assert hasattr(import_module(module), symbol), name


def test_a_release_says_one_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == numpyro_ebm.__version__
    assert f"\nversion: {project['version']}\n" in citation
    assert f"version = {{{project['version']}}}" in (DOCS / "reference" / "citing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("site", "repository", "expected"),
    [
        ("", "", "See the report and .\n"),
        (
            "https://site.example/",
            "https://code.example/x",
            "See [the report](https://site.example/how_to/believe.html#k) and ![hero](https://code.example/x/raw/main/docs/h.png).\n",
        ),
    ],
)
def test_readme_of_a_release_has_links_that_lead_somewhere(site, repository, expected):
    release = runpy.run_path(str(ROOT / ".ci" / "release.py"))
    readme = "See [the report](docs/how_to/believe.md#k) and ![hero](docs/h.png).\n"
    assert release["absolute"](readme, site, repository) == expected
    for metadata in (release["with_addresses"]("[project]\n", site, repository),):
        assert tomllib.loads(metadata)["project"].get("urls", {}).get("Source", "") == repository
