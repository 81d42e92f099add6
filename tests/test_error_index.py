# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""docs/reference/errors.md has every error and warning of the package, and none that is not raised any more."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "numpyro_ebm"
PAGE = ROOT / "docs" / "reference" / "errors.md"
FILLED = "…"  # stands for what a message has of names and numbers
WORDS_OF_A_MESSAGE = 4  # shorter ones are parts of others
WORDS_ELSEWHERE = 8  # a string that is no argument of raise or warn is a message if it is a sentence
MESSAGES_OF_AN_ENTRY = 3  # some are said in two places


def _template(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(value) if isinstance(value, ast.Constant) else FILLED for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return FILLED


def _num_words(text: str) -> int:
    return sum(any(map(str.isalpha, word)) for word in text.split())


def _strings(node: ast.AST, is_told: bool = False) -> Iterator[tuple[int, str]]:
    """The messages under a node: what is raised or warned of, and other sentences, which functions make for these."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        is_told_here = is_told or isinstance(child, ast.Raise)
        is_told_here |= isinstance(child, ast.Call) and ast.unparse(child.func) == "warnings.warn"
        text = " ".join(_template(child).split())
        if _num_words(text) >= (WORDS_OF_A_MESSAGE if is_told_here else WORDS_ELSEWHERE):
            yield child.lineno, text
        else:
            yield from _strings(child, is_told_here)


def messages(source: str) -> list[tuple[int, str]]:
    return list(_strings(ast.parse(source)))


def entries() -> list[str]:
    """The literal that begins an item of the page."""
    found = re.findall(r"^\* (`+) ?(.+?) ?\1", PAGE.read_text(), re.M)
    return [entry for _, entry in found]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_message_of_a_file_is_in_the_index(file):
    known = entries()
    missing = [f"{file.name}:{line}: {text}" for line, text in messages(file.read_text()) if not any(e in text for e in known)]
    assert not missing, f"{PAGE.name} lacks:\n" + "\n".join(missing)


def test_every_entry_of_the_index_is_a_message():
    told = [text for file in FILES for _, text in messages(file.read_text())]
    stale = [entry for entry in entries() if not any(entry in text for text in told)]
    assert not stale, "the package does not say:\n" + "\n".join(stale)


def miscounted(text: str) -> list[tuple[int, int]]:
    """``(said, found)`` of every list of messages whose title says another number than it has."""
    lists = re.findall(r"^:::\{dropdown\} The (\d+) messages\n(.*?)^:::$", text, re.M | re.S)
    counts = [(int(said), len(re.findall(r"^\* ", items, re.M))) for said, items in lists]
    return [(said, found) for said, found in counts if said != found]


def test_every_list_of_messages_has_as_many_as_its_title_says():
    text = PAGE.read_text()
    titles = re.findall(r"^:::\{dropdown\} (.*)$", text, re.M)
    assert len(titles) > 20
    assert [title for title in titles if not re.fullmatch(r"The \d+ messages", title)] == []
    assert miscounted(text) == []


def test_entries_are_long_enough_to_tell_messages_apart():
    """It would catch an entry such as "must be", which every message would be found by."""
    told = {text for file in FILES for _, text in messages(file.read_text())}
    vague = [entry for entry in entries() if sum(entry in text for text in told) > MESSAGES_OF_AN_ENTRY]
    assert not vague, vague


def test_messages_are_found_where_they_are_raised_warned_of_or_made():
    """It would catch a collector that sees nothing, by which the index is always complete."""
    source = '''
def f(x):
    """A docstring of more than eight words, which nobody is ever told."""
    if x:
        raise ValueError(f"site '{x}': its data are of another shape")
    warnings.warn("x is " + f"{x}, which is too much", stacklevel=2)
    return "a fix that stands alone, and that a message ends with: take less"
'''
    found = [text for _, text in messages(source)]
    assert [text.split(" ")[0] for text in found] == ["site", "x", "a"]
    assert FILLED in found[0]
    assert FILLED in found[1]
