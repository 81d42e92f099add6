# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Every literal that names a public symbol links to its page: ``SVI``, ``ParticleMMLE.run``, ``negative_phase(model)``."""

import inspect
import re
from pathlib import Path

import inventories
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform

import numpyro_ebm

# Names of ours that are also words, or settings: they link where they are called.
_WORDS = {"save", "load", "langevin", "denoise"}


def _ours():
    """``{what a page may call it: the name of its entry}``, methods of classes too."""
    symbols = {}
    modules = [(numpyro_ebm, "numpyro_ebm", numpyro_ebm.__all__)]
    for name in ("infer", "samplers", "objectives", "distributions", "datasets"):
        module = getattr(numpyro_ebm, name, None)
        if module is not None:
            modules.append((module, module.__name__, [n for n in vars(module) if not n.startswith("_")]))
    for module, path, names in modules:
        for name in names:
            symbol = getattr(module, name)
            if inspect.ismodule(symbol) or not getattr(symbol, "__module__", "").startswith("numpyro_ebm"):
                continue
            full = f"{path}.{name}"
            symbols.setdefault(name, full)
            symbols[full] = full
            if inspect.isclass(symbol):
                for member, value in inspect.getmembers(symbol, callable):
                    if not member.startswith("_") and getattr(value, "__module__", "").startswith("numpyro_ebm"):
                        symbols.setdefault(f"{name}.{member}", f"{full}.{member}")
    return symbols


class LinkLiterals(SphinxPostTransform):
    default_priority = 4  # before references are resolved

    def run(self, **kwargs):
        entries = self.env.get_domain("py").objects
        foreign = inventories.foreign_symbols(Path(self.app.srcdir))
        ours = _ours()
        here = self.env.docname.rpartition("/")[2]
        for literal in list(self.document.findall(nodes.literal)):
            if isinstance(literal.parent, nodes.reference | nodes.title):
                continue
            match = re.fullmatch(r"([\w.]+)(\([^()]*\))?", literal.astext())
            if match is None or (match[1] in _WORDS and match[2] is None):
                continue
            full = ours.get(match[1])
            if full in entries and entries[full].docname != self.env.docname and full != here:
                address = self.app.builder.get_relative_uri(self.env.docname, entries[full].docname) + f"#{entries[full].node_id}"
                self._link(literal, address, full, internal=True)
            elif match[1] in foreign:
                self._link(literal, foreign[match[1]], match[1], internal=False)

    def _link(self, literal, address, title, *, internal):
        reference = nodes.reference("", "", internal=internal, refuri=address, reftitle=title)
        literal.replace_self(reference)
        reference += literal


def setup(app):
    app.add_post_transform(LinkLiterals)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
