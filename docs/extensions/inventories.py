# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Intersphinx without a network: ``inventories.toml`` as the inventory files that Sphinx reads."""

import tomllib
import zlib


def _read(docs):
    return tomllib.loads((docs / "inventories.toml").read_text(encoding="utf-8"))


def _locations(tables):
    """``{package: (url, {name: location})}``, short names among them."""
    aliases = tables.pop("aliases")
    found = {}
    for package, table in tables.items():
        names = {name: place.replace("$", name) for place, group in table["pages"].items() for name in group}
        names |= {short: names[name] for short, name in aliases.items() if name in names}
        found[package] = table["url"], names
    return found


def mapping(docs):
    """The value of ``intersphinx_mapping``; writes the inventories that it names."""
    folder = docs / "_build" / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    mapped = {}
    for package, (url, names) in _locations(_read(docs)).items():
        header = (
            f"# Sphinx inventory version 2\n# Project: {package}\n# Version: \n"
            "# The remainder of this file is compressed using zlib.\n"
        )
        lines = "".join(f"{name} py:object 1 {place} -\n" for name, place in sorted(names.items()))
        (folder / f"{package}.inv").write_bytes(header.encode() + zlib.compress(lines.encode()))
        mapped[package] = url, str(folder / f"{package}.inv")
    return mapped


def foreign_symbols(docs):
    """``{what a page may call it: (address, full name)}``: ``SVI``, ``numpyro.infer.SVI`` and ``numpyro.infer.svi.SVI``."""
    symbols = {}
    for url, names in _locations(_read(docs)).values():
        for name, place in names.items():
            symbols[name] = url + place
            if name.startswith("numpyro.") and (short := name.rpartition(".")[2])[0].isupper():
                symbols[short] = url + place
    return symbols
