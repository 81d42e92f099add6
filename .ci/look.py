# Copyright Contributors to the numpyro_ebm project.
# SPDX-License-Identifier: Apache-2.0

"""Opens every page of the built documentation in a browser, as wide as a desk's and as a phone's, and says what is wrong with it.

What it finds, by page and width: a page that is wider than the window (with the first element that sticks out), errors on the
console, pictures that did not load, requests to other hosts, and links within the site that lead nowhere. Then it asks the
site's own search for words that readers look for. ``--pictures FOLDER`` writes screenshots, light and dark, of the pages named.

It needs playwright and a Chromium that is installed (``CHROMIUM`` names it, else it is looked for). Run ``make look``.
"""

import argparse
import functools
import http.server
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs" / "extensions"))
from addresses import read  # noqa: E402

WIDTHS = {"desk": 1400, "phone": 420}
WORDS = ("partition function", "anomaly", "checkpoint", "GPU", "cite", "install")
STICKS_OUT = """() => {
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= width + 1) return null;
    for (const element of document.querySelectorAll('main *, header *, footer *')) {
        const box = element.getBoundingClientRect();
        let parent = element.parentElement, scrolls = false;
        for (; parent; parent = parent.parentElement)
            if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(parent).overflowX)) scrolls = true;
        if (box.right > width + 1 && box.width > 0 && !scrolls) return element.outerHTML.slice(0, 160);
    }
    return 'something';
}"""
BROKEN = "() => [...document.images].filter(i => i.complete && i.naturalWidth === 0 && i.src).map(i => i.src)"
LINKS = "() => [...document.querySelectorAll('a[href]')].map(a => a.href)"
IDS = "() => [...document.querySelectorAll('[id]')].map(e => e.id)"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serve(folder):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


def look_at(page, url, own, width):
    """``(problems, links, ids)`` of a page at a width; ``own``: how addresses of the site begin."""
    found, errors, elsewhere = [], [], set()
    page.set_viewport_size({"width": width, "height": 900})
    listeners = {
        "console": lambda message: errors.append(message.text) if message.type == "error" else None,
        "pageerror": lambda error: errors.append(str(error)),
        "request": lambda request: elsewhere.add(request.url) if not request.url.startswith((*own, "data:", "blob:")) else None,
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.goto(url, wait_until="load")
    page.evaluate("() => document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
    page.wait_for_timeout(50)
    out = page.evaluate(STICKS_OUT)
    found += [f"is wider than the window: {out}"] if out else []
    found += [f"picture does not load: {source}" for source in page.evaluate(BROKEN)]
    found += [f"console: {error}" for error in errors] + [f"asks another host: {address}" for address in sorted(elsewhere)]
    links, ids = page.evaluate(LINKS), set(page.evaluate(IDS))
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    return found, links, ids


def dead_links(links, ids, folder, base):
    """Links within the site to pages, files or anchors that are not there."""
    for url, targets in links.items():
        for target in sorted(set(targets)):
            address, anchor = urldefrag(urljoin(url, target))
            if not address.startswith(base) or "search.html" in address:
                continue
            path = folder / unquote(urlparse(address).path.lstrip("/"))
            path = path / "index.html" if path.is_dir() else path
            if not path.exists() or (anchor and unquote(anchor) not in ids.get(address, [unquote(anchor)])):
                yield url, target


def search(page, base):
    for word in WORDS:
        page.goto(f"{base}search.html?q={word.replace(' ', '+')}")
        page.wait_for_selector("#search-results p.search-summary, #search-results ul li", timeout=20_000)
        page.wait_for_timeout(1500)
        hits = page.eval_on_selector_all("#search-results ul.search li a", "links => links.map(a => a.textContent)")
        print(f"search for {word!r}: {len(hits)} results, first {hits[:3]}")
        if not hits:
            yield f"search finds nothing for {word!r}"


def pictures(browser, base, folder, pages):
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in ("light", "dark"):
        for name, width in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            for path in pages:
                page.goto(base + path)
                page.wait_for_timeout(300)
                title = re.sub(r"\W+", "_", path)
                page.screenshot(path=folder / f"{title}_{name}_{scheme}.png", full_page=True)
            page.close()


def main(args):
    folder = Path(args.site).resolve()
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.html") if "_static" not in path.parts)
    names = [name for name in names if not name.startswith("_modules/")] if not args.sources else names
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    base, problems, links, ids = serve(folder), [], {}, {}
    site = read(ROOT / "docs")["site"]
    own = (base, site) if site else (base,)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        if args.pictures:
            pictures(browser, base, Path(args.pictures), args.pages or ["index.html"])
            return 0
        page = browser.new_page()
        if site:  # what pages ask the published site for, the list of its versions, is in the build
            page.route(f"{site}**", lambda route: route.fulfill(path=folder / route.request.url.removeprefix(site)))
        for name in names:
            for title, width in WIDTHS.items():
                found, links[base + name], ids[base + name] = look_at(page, base + name, own, width)
                problems += [f"{name} ({title}): {what}" for what in found]
        problems += [f"{url.removeprefix(base)}: dead link {target}" for url, target in dead_links(links, ids, folder, base)]
        problems += list(search(page, base))
        browser.close()
    print("\n".join(problems))
    print(f"{len(names)} pages at {len(WIDTHS)} widths: {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", nargs="?", default="docs/_build/html")
    parser.add_argument("--sources", action="store_true", help="the pages of source code too")
    parser.add_argument("--pictures", help="a folder for screenshots, and nothing else")
    parser.add_argument("--pages", nargs="*", help="the pages to take pictures of")
    sys.exit(main(parser.parse_args()))
