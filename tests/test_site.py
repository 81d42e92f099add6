# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The documentation's parts fit together: what can be told without building it."""

import json
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


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_code_of_a_page_can_be_read_without_scrolling(page):
    # 88 characters are what the column holds.
    kinds = ("python", "{code-cell}", "bash")
    lines = [line for kind, code in fenced(page.read_text(encoding="utf-8")) if kind in kinds for line in code.splitlines()]
    assert [line for line in lines if len(line) > 88 and not line.startswith(":")] == []


def test_examples_of_the_api_can_be_read_without_scrolling():
    code = re.compile(r"^ *((?:>>>|\.\.\.) .{85,})$", re.MULTILINE)
    modules = sorted((ROOT / "numpyro_ebm").rglob("*.py"))
    assert [(path.name, line) for path in modules for line in code.findall(path.read_text(encoding="utf-8"))] == []


def test_every_figure_of_a_page_is_described_for_those_who_do_not_see_it():
    draws = re.compile(r"\bplt\.\w+\(|\baz\.plot_\w+\(|\.plot\(")
    described = re.compile(r'^:mystnb: \{image: \{alt: "[^"]{20,}"\}\}$', re.MULTILINE)
    cells = [(page, code) for page in PAGES for kind, code in fenced(page.read_text(encoding="utf-8")) if kind == "{code-cell}"]
    figures = [(page, code) for page, code in cells if draws.search(code)]
    assert len(figures) > 40
    assert [(page.name, code) for page, code in figures if not described.search(code)] == []


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


NOWHERE = {"site": "", "repository": "", "branch": "gh-pages"}
SOMEWHERE = {"site": "https://site.example/x/", "repository": "https://github.com/someone/x", "branch": "gh-pages"}


@pytest.mark.parametrize(
    ("found_at", "expected"),
    [
        (NOWHERE, "See the report and .\n"),
        (
            SOMEWHERE,
            "See [the report](https://site.example/x/how_to/believe.html#k) and "
            "![hero](https://github.com/someone/x/raw/main/docs/h.png).\n",
        ),
    ],
)
def test_readme_of_a_release_has_links_that_lead_somewhere(found_at, expected):
    release = runpy.run_path(str(ROOT / ".ci" / "release.py"))
    readme = "See [the report](docs/how_to/believe.md#k) and ![hero](docs/h.png).\n"
    assert release["absolute"](readme, **found_at) == expected
    metadata = release["with_addresses"]("[project]\n", **found_at)
    assert tomllib.loads(metadata)["project"].get("urls", {}).get("Source", "") == found_at["repository"]


@pytest.fixture
def addresses():
    return runpy.run_path(str(DOCS / "extensions" / "addresses.py"))


def test_addresses_are_read_with_or_without_a_slash_at_their_end(addresses, tmp_path):
    for end in ("", "/"):
        lines = [
            f'site = "https://site.example/x{end}"',
            f'repository = "https://github.com/someone/x{end}"',
            'branch = "gh-pages"',
        ]
        (tmp_path / "addresses.toml").write_text("\n".join(lines), encoding="utf-8")
        assert addresses["read"](tmp_path) == SOMEWHERE


def test_without_addresses_the_site_names_none(addresses):
    assert addresses["theme_options"]("0.1.0", **NOWHERE) == {}
    assert addresses["versions"]([], "0.1.0", **NOWHERE) == []
    assert addresses["install"]("0.1.0", **NOWHERE) == ""
    assert addresses["colab"]("a.ipynb", "0.1.0", **NOWHERE) == ""


def test_notebooks_open_in_colab_from_the_published_site_and_install_that_release(addresses):
    # Catches a link to the newest notebook on a page of an old release, and one to a host from which Colab opens nothing.
    link = "https://colab.research.google.com/github/someone/x/blob/gh-pages/0.1.0/_downloads/notebooks/a.ipynb"
    assert addresses["colab"]("_downloads/notebooks/a.ipynb", "0.1.0", **SOMEWHERE) == link
    assert addresses["colab"]("a.ipynb", "0.1.0", **SOMEWHERE | {"repository": "https://code.example/someone/x"}) == ""
    assert addresses["colab"]("a.ipynb", "0.1.0", **SOMEWHERE | {"branch": ""}) == ""
    line = '%pip install --quiet "numpyro_ebm[examples] @ git+https://github.com/someone/x@v0.1.0"'
    assert addresses["install"]("0.1.0", **SOMEWHERE) == line


def test_the_version_switcher_reads_one_list_for_all_releases(addresses):
    options = addresses["theme_options"]("0.1.0", **SOMEWHERE)
    assert options["switcher"] == {"json_url": "https://site.example/x/versions.json", "version_match": "0.1.0"}
    assert options["icon_links"][0]["url"] == SOMEWHERE["repository"]


@pytest.fixture(scope="module")
def notebooks():
    return runpy.run_path(str(DOCS / "extensions" / "plain.py"))


MYST = """(a-label)=
# Title

{cite:t}`bao2020` have {term}`particles <particle>`, a {ref}`word <x>` and `{"a": 1}` {cite:p}`kuntz2023,bao2020`.
See [the report](../how_to/believe.md#k), [below](#end) and [JAX](https://jax.dev/a.md).

:::{admonition} Before you start
:class: tip
You need [one](01_one.md).

* a list
:::

```{image} ../_static/silent_error.png
:alt: Two modes.
```
"""
PLAIN = """# Title

Bao (2020) have particles, a word and `{"a": 1}` (Kuntz et al. 2023; Bao 2020).
See REPORT, BELOW and [JAX](https://jax.dev/a.md).

> **Before you start**
>
> You need ONE.
>
> * a list

PICTURE
"""
HERE = "https://site.example/x/0.1.0/"


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("", {"REPORT": "the report", "BELOW": "below", "ONE": "one", "PICTURE": "*Two modes.*"}),
        (
            HERE,
            {
                "REPORT": f"[the report]({HERE}how_to/believe.html#k)",
                "BELOW": f"[below]({HERE}tutorials/02_two.html#end)",
                "ONE": f"[one]({HERE}tutorials/01_one.html)",
                "PICTURE": f"![Two modes.]({HERE}_images/silent_error.png)",
            },
        ),
    ],
    ids=["no site", "site"],
)
def test_text_of_a_notebook_is_what_jupyter_can_show(notebooks, site, words):
    expected = re.sub("REPORT|BELOW|ONE|PICTURE", lambda match: words[match[0]], PLAIN)
    cited = {"bao2020": ("Bao", "2020"), "kuntz2023": ("Kuntz et al.", "2023")}
    assert notebooks["plain"](MYST, "tutorials/02_two", site=site, cited=cited) == expected


def test_a_box_in_a_box_is_a_quote_in_a_quote(notebooks):
    boxes = "::::{note}\n:::{dropdown} More\ntext\n:::\n::::\n"
    assert notebooks["plain"](boxes, "a", site="", cited={}) == "> **Note**\n>\n> > **More**\n> >\n> > text\n"


def test_no_notebook_has_text_that_jupyter_does_not_show(notebooks):
    # Catches a role, box or link of a new kind, which would stand in a notebook as it is written.
    cited = notebooks["citations"](DOCS / "references.bib")
    assert cited["bao2020"] == ("Bao et al.", "2020")
    left = re.compile(r"\{[a-z:]+\}`|^:::|^```\{|^\(\S+\)=$|\]\((?!https?:)", re.MULTILINE)
    pages = [page for page in PAGES if page.parent.name in ("tutorials", "get_started")]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    texts = {
        page: re.sub(r"^```\{code-cell\}.*?^```$", "", text, flags=re.M | re.S)
        for page, text in texts.items()
        if "{code-cell}" in text
    }
    assert len(texts) > 9
    for page, text in texts.items():
        name = str(page.relative_to(DOCS).with_suffix(""))
        for site in ("", SOMEWHERE["site"]):
            assert left.findall(notebooks["plain"](text, name, site=site, cited=cited)) == [], page


@pytest.fixture
def published(tmp_path):
    """``publish(version, page)`` puts a site of one page into a folder."""
    folder, release = tmp_path / "branch", runpy.run_path(str(ROOT / ".ci" / "publish.py"))
    (folder / ".git").mkdir(parents=True)

    def publish(version, page):
        built = tmp_path / f"built {version}"
        built.mkdir()
        (built / page).write_text(version, encoding="utf-8")
        (built / "versions.json").write_text(json.dumps([{"version": version}]), encoding="utf-8")
        release["publish"](built, folder, SOMEWHERE["site"])
        return json.loads((folder / "versions.json").read_text(encoding="utf-8"))

    publish.folder = folder
    return publish


def test_a_published_site_keeps_older_releases_and_has_the_newest_at_its_top(published):
    # 0.10 is newer than 0.9, and a correction of an old release is not the newest.
    for version, page in (("0.9.0", "old.html"), ("0.10.0", "new.html"), ("0.9.1", "old.html")):
        entries = published(version, page)
    site = SOMEWHERE["site"]
    newest = {"name": "0.10.0 (newest)", "version": "0.10.0", "url": site, "preferred": True}
    assert entries == [newest, *({"version": old, "url": f"{site}{old}/"} for old in ("0.9.1", "0.9.0"))]
    files = {str(path.relative_to(published.folder)) for path in published.folder.rglob("*") if path.is_file()}
    releases = {"0.9.0/old.html", "0.10.0/new.html", "0.9.1/old.html"}
    assert files == releases | {"new.html", "versions.json", ".nojekyll"}
    assert (published.folder / ".git").is_dir()


def test_a_folder_that_is_no_published_site_is_left_as_it_is(published):
    (published.folder / "code.py").touch()
    with pytest.raises(SystemExit, match=r"no versions\.json"):
        published("0.1.0", "index.html")
    assert (published.folder / "code.py").exists()
