# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Builds the package as a release would be, checks it, and runs it in a clean environment.

The README of a release must read where the repository is not: its links and pictures become absolute, by the addresses in
``docs/addresses.toml``; where that names none, they lose their targets, and the pictures go. Then source and wheel are built
(``build``), checked (``twine check --strict``), and the wheel is installed in a new environment, where the README's first example
runs. Nothing is uploaded. Run ``make release``; the files are in ``dist``.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "extensions"))
from addresses import read  # noqa: E402

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def absolute(readme, *, site, repository, **_):
    """The README with links that lead somewhere from anywhere."""

    def replace(match):
        picture, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if picture:
            return f"![{text}]({repository}/raw/main/{path})" if repository else ""
        if path.startswith("docs/") and path.endswith(".md") and site:
            page = path.removeprefix("docs/").removesuffix(".md")
            return f"[{text}]({site}{page}.html{'#' + anchor if anchor else ''})"
        return f"[{text}]({repository}/blob/main/{target})" if repository else text

    return LINK.sub(replace, readme)


def with_addresses(pyproject, *, site, repository, **_):
    """``pyproject.toml`` with the addresses that there are."""
    urls = {"Documentation": site, "Source": repository, "Changelog": repository and f"{repository}/blob/main/CHANGELOG.md"}
    lines = [f'{name} = "{url}"' for name, url in urls.items() if url]
    return pyproject + ("\n[project.urls]\n" + "\n".join(lines) + "\n" if lines else "")


def run(*command, **settings):
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, **settings)


def main():
    addresses = read(ROOT / "docs")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        for name in filter(None, files):
            if (ROOT / name).exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, tree / name)
        readme = (tree / "README.md").read_text(encoding="utf-8")
        (tree / "README.md").write_text(absolute(readme, **addresses), encoding="utf-8")
        pyproject = (tree / "pyproject.toml").read_text(encoding="utf-8")
        (tree / "pyproject.toml").write_text(with_addresses(pyproject, **addresses), encoding="utf-8")
        run(sys.executable, "-m", "build", "--outdir", dist, tree)
        run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))

        clean = Path(folder) / "clean"
        venv.create(clean, with_pip=True)
        (wheel,) = dist.glob("*.whl")
        python = clean / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[nn]")
        example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run(python, "-W", "error", "-W", "ignore:\nArviZ is undergoing:FutureWarning", "-c", example, cwd=folder, env=environment)
    print("built and checked:", *(path.name for path in sorted(dist.iterdir())))


if __name__ == "__main__":
    main()
