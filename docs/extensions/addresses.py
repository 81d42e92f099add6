# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""What the site links to where the project can be found (``addresses.toml``), and nothing where it cannot be found yet."""

import json
import re
import tomllib

from packaging.version import Version


def read(docs):
    """``{"site": ..., "repository": ..., "branch": ...}``: a site ends with a slash, a repository does not."""
    found = tomllib.loads((docs / "addresses.toml").read_text(encoding="utf-8"))
    site, repository = found["site"].rstrip("/"), found["repository"].rstrip("/").removesuffix(".git")
    return {"site": site and f"{site}/", "repository": repository, "branch": found["branch"]}


def colab(notebook, version, *, repository, branch, **_):
    """Where Colab opens a notebook of a release, from the published site's branch."""
    github = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)", repository)
    return f"https://colab.research.google.com/github/{github[1]}/blob/{branch}/{version}/{notebook}" if github and branch else ""


def install(version, *, repository, **_):
    """The line of a notebook that installs a release, with all that notebooks import."""
    return f'%pip install --quiet "numpyro_ebm[examples] @ git+{repository}@v{version}"' if repository else ""


def theme_options(version, *, site, repository, **_):
    """The settings of the theme: a link to the source, and a version switcher with a banner on pages of old releases."""
    options = {}
    if repository:
        icon = "fa-brands fa-github" if repository.startswith("https://github.com/") else "fa-solid fa-code-branch"
        options["icon_links"] = [{"name": "Source", "url": repository, "icon": icon}]
    if site:
        options["switcher"] = {"json_url": f"{site}versions.json", "version_match": version}
        options["check_switcher"] = False  # the build asks no network
        options["navbar_end"] = ["version-switcher", "theme-switcher", "navbar-icon-links"]
        options["show_version_warning_banner"] = True
    return options


def versions(older, version, *, site, **_):
    """The entries of ``versions.json``, newest first, from those of older releases and one more."""
    known = sorted({version, *(entry["version"] for entry in older)}, key=Version, reverse=True)
    newest = {"name": f"{known[0]} (newest)", "version": known[0], "url": site, "preferred": True}
    return [newest, *({"version": old, "url": f"{site}{old}/"} for old in known[1:])] if site else []


def _write(app, exception):
    entries = versions([], app.config.version, site=app.config.html_baseurl)
    if exception is None and app.builder.format == "html" and entries:
        (app.outdir / "versions.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def setup(app):
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
