# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""The text of a page as Jupyter and Colab show it: they know none of MyST's roles, boxes, labels and links between pages."""

import re
from posixpath import basename, dirname, join, normpath

from pybtex.database import parse_file

LABEL = re.compile(r"^\([\w-]+\)=\n", re.MULTILINE)
ROLE = re.compile(r"\{([\w:]+)\}`([^`]*)`")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)")
PICTURE = re.compile(r"^```\{(?:image|figure)\} (\S+)\n(?::alt: ([^\n]*)\n)?.*?^```$", re.MULTILINE | re.DOTALL)
BOX = re.compile(r"^(:{3,})\{([\w-]+)\} *([^\n]*)\n(?::[\w-]+:[^\n]*\n)*(.*?)^\1$", re.MULTILINE | re.DOTALL)


def citations(bibliography):
    """``{"bao2020": ("Bao et al.", "2020")}``, from a file of BibTeX."""
    found = {}
    for key, entry in parse_file(str(bibliography)).entries.items():
        names = [" ".join(map(str, person.rich_last_names)) for person in entry.persons["author"]]
        found[key] = (f"{names[0]} et al." if len(names) > 2 else " and ".join(names), entry.fields["year"])
    return found


def plain(text, page, *, site, cited):
    """
    :param page: what the text is of, such as ``"tutorials/02_energy_prior"``.
    :param site: where its pages are, with a slash at the end; where it is empty, links and pictures become words.
    :param cited: as of :func:`citations`.
    """

    def role(match):
        name, content = match.groups()
        if not name.startswith("cite:"):
            return re.sub(r"\s*<[^>]*>$", "", content)
        works = [cited[key.strip()] for key in content.split(",")]
        if name == "cite:t":
            return ", ".join(f"{authors} ({year})" for authors, year in works)
        return "(" + "; ".join(f"{authors} {year}" for authors, year in works) + ")"

    def link(match):
        is_picture, words, (path, _, anchor) = match[1], match[2], match[3].partition("#")
        if is_picture:
            return picture(path, words)
        words = words or (anchor or basename(path).removesuffix(".md")).replace("-", " ").replace("_", " ")
        target = normpath(join(dirname(page), path)) if path else f"{page}.md"
        address = re.sub(r"\.md$", ".html", target) + (f"#{anchor}" if anchor else "")
        return f"[{words}]({site}{address})" if site else words

    def picture(path, words):
        return f"![{words}]({site}_images/{basename(path)})" if site else f"*{words}*" if words else ""

    def box(match):
        _, kind, title, body = match.groups()
        lines = [f"**{title or kind.capitalize()}**", "", *BOX.sub(box, body).strip().split("\n")]
        return "\n".join(f"> {line}".rstrip() for line in lines)

    text = PICTURE.sub(lambda match: picture(match[1], match[2] or ""), LABEL.sub("", text))
    return BOX.sub(box, LINK.sub(link, ROLE.sub(role, text)))
