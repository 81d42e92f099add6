# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Lays the built documentation out as it is published, in a checkout of the branch that holds it. Nothing is committed or uploaded.

The folder gets the release that was built twice: below its version, where it stays, and, if it is the newest release, at the top.
``versions.json`` names it beside the releases that are there already. Run ``make publish TO=FOLDER``.
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "extensions"))
from addresses import read, versions  # noqa: E402

STAYS = {".git", "CNAME"}  # what is at the top of the branch and not of a release


def publish(built, folder, site):
    """Puts a built release into the folder; returns the entries of its ``versions.json``."""
    (entry,) = json.loads((built / "versions.json").read_text(encoding="utf-8"))
    listed = folder / "versions.json"
    if not listed.exists() and {path.name for path in folder.iterdir()} - STAYS:
        raise SystemExit(f"{folder} has files, but no versions.json: it does not hold a published site, and is left as it is.")
    older = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    entries = versions(older, entry["version"], site=site)
    releases = {entry["version"] for entry in entries}
    shutil.rmtree(folder / entry["version"], ignore_errors=True)
    shutil.copytree(built, folder / entry["version"], ignore=shutil.ignore_patterns("versions.json", ".doctrees", ".buildinfo*"))
    if entries[0]["version"] == entry["version"]:
        for path in folder.iterdir():
            if path.name not in releases | STAYS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(folder / entry["version"], folder, dirs_exist_ok=True)
    (folder / ".nojekyll").touch()  # GitHub would leave out folders such as _static
    listed.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return entries


def main(folder):
    addresses = read(ROOT / "docs")
    if not addresses["site"]:
        sys.exit("docs/addresses.toml names no site: set where the documentation will be found.")
    if not (Path(folder) / ".git").exists():
        sys.exit(f"{folder} is no checkout: git worktree add {folder} {addresses['branch']}")
    for entry in publish(ROOT / "docs" / "_build" / "html", Path(folder), addresses["site"]):
        print(entry["version"], entry["url"])


if __name__ == "__main__":
    main(*sys.argv[1:])
