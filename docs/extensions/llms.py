# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""``llms.txt``: the pages of the site, with a line each, for programs that read; and ``llms-full.txt``, their text."""

import re
from pathlib import Path

SECTIONS = ("get_started", "tutorials", "how_to", "guide", "api", "reference")


def _summary(text):
    """The first paragraph, as one line."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", body):
        paragraph = paragraph.strip()
        if paragraph and not paragraph.startswith(("#", "```", ":::", "(", "!", "|", "<", "%")):
            return re.sub(r"\]\([^)]*\)", "", re.sub(r"\s+", " ", paragraph)).replace("[", "")
    return ""


def _write(app, exception):
    if exception is not None or app.builder.format != "html":
        return
    base = app.config.html_baseurl
    lines, texts = (
        [f"# {app.config.project}", "", "> Energy-based priors and energy-based latent variable models in NumPyro.", ""],
        [],
    )
    for section in SECTIONS:
        pages = [page for page in app.env.toctree_includes.get(f"{section}/index", []) if page.startswith(f"{section}/")]
        lines += [f"## {app.env.titles[f'{section}/index'].astext()}", ""]
        for page in [f"{section}/index", *pages]:
            text = Path(app.env.doc2path(page)).read_text(encoding="utf-8")
            summary = "" if page.startswith("api/") else _summary(text)
            lines.append(f"- [{app.env.titles[page].astext()}]({base}{page}.html)" + (f": {summary}" if summary else ""))
            if not page.startswith("api/"):
                texts.append(f"<!-- {page} -->\n\n{text}")
        lines.append("")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    (Path(app.outdir) / "llms-full.txt").write_text("\n\n".join(texts), encoding="utf-8")


def setup(app):
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
