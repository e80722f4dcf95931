"""The site and the pages of the repository: every link leads somewhere, every public callable has its place, and a browser
shows it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.conftest import ROOT
from tests.test_docstrings import REACHED
from website import pages

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXTS = [
    path
    for folder in (".", "docs", "hooks", "tutorials", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md")) + sorted((ROOT / folder).glob("llms.txt"))
]


# -- in the repository --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_the_repository_lead_somewhere(path):
    text = "".join(piece for piece in pages.CODE.split(path.read_text(encoding="utf-8")) if not piece.startswith("`"))
    for target, _ in pages.LINK.findall(text):
        assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_map_names_every_page():
    """llms.txt is what a reader gets who asks for all; README leads to every page in docs/."""
    for name in ("llms.txt", "README.md"):
        text = (ROOT / name).read_text()
        for page in (ROOT / "docs").glob("*.md"):
            assert f"(docs/{page.name})" in text, (name, page.name)


def test_links_become_those_of_the_site():
    turned = pages.turned
    assert turned("[a](../tutorials/1-first-look.py)", "docs/names.md") == "[a](tutorials/1-first-look.md)"
    assert turned("[a](docs/code.md#which)", "README.md") == "[a](code.md#which)"
    assert turned("[a](../docs/code.md)", "hooks/mamba.md") == "[a](../code.md)"
    assert turned("![a](docs/seven-architectures.png)", "README.md") == "![a](seven-architectures.png)"
    assert turned("[a](../gatedlens/files.py)", "docs/code.md").endswith("/blob/main/gatedlens/files.py)")
    for same in ("[a](https://arxiv.org)", "[a](#here)", "`[a](../tutorials/1-first-look.py)`", "x[0](y)"):
        assert turned(same, "docs/names.md") == same


# -- built ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The links, anchors and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(given["id"])
        if tag == "a" and given.get("href") is not None:
            self.links.append(given["href"])
        loads = tag in ("script", "img", "link", "iframe", "source") and given.get("rel") not in (
            "canonical",
            "prev",
            "next",
        )
        if loads and (given.get("src") or given.get("href")):
            self.loaded.append(given.get("src") or given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, with such outputs of tutorials as there are."""
    out = tmp_path_factory.mktemp("site")
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    assert "WARNING" not in built.stderr, built.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def built(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site, built):
    assert len(built) > 50
    for path, page in built.items():
        for link in (*page.links, *page.loaded):
            target, _, anchor = unquote(link).partition("#")
            if re.match(r"(https?|mailto|data):", link) or path.name == "404.html":
                continue
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            assert file.exists(), f"{path.relative_to(site)}: {link}"
            if anchor and file in built:
                assert anchor in built[file].anchors, f"{path.relative_to(site)}: {link}"


@pytest.mark.slow
def test_the_maps_lead_to_pages_of_the_site(site):
    for name in ("llms.txt", "AGENTS.txt"):
        links = [target for target, _ in pages.LINK.findall((site / name).read_text(encoding="utf-8"))]
        assert len(links) > 2 and all((site / link).exists() for link in links), (name, links)


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site, built):
    for path, page in built.items():
        assert not [one for one in page.loaded if re.match(r"(https?:)?//", one)], path
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    for script in ("import(", "unpkg.com"):
        assert (
            script in "".join(p.read_text() for p in site.glob("assets/javascripts/bundle*.js")) or script == "import("
        )
    assert (site / "assets" / "mermaid-11.17.2.min.js").exists(), "else the theme would ask unpkg.com for it"


@pytest.mark.slow
def test_every_public_callable_is_in_the_reference(site):
    text = {path.stem: path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html")}
    anchors = {
        anchor.rpartition(".")[2] for page in text.values() for anchor in re.findall(r'id="(gatedlens[\w.]+)"', page)
    }
    assert not [said for said in REACHED if said.rpartition(".")[2] not in anchors]
    for said, _, names in pages.public():
        for name in names:
            assert f">{said}.{name}<" in text[said] or f"{said}.{name}" in text[said], f"{said}.{name}"
    assert text["gl.lens"].count("doc-heading") >= 6 and "gatedlens attribute" in text["commands"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_shows_it(site, tmp_path):
    """Headless Chromium, without network: the diagram is drawn, the picture is there, the page is no blank one."""
    import functools
    import http.server
    import threading

    from PIL import Image

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    common = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000",
        f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    ]  # fmt: skip
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        for page, size, colours in (("index.html", "1200,1400", 200), ("hooks/mamba.html", "1200,2400", 50)):
            picture = tmp_path / "page.png"
            subprocess.run(
                [*common, f"--window-size={size}", f"--screenshot={picture}", f"{address}/{page}"],
                check=True, capture_output=True, timeout=120,
            )  # fmt: skip
            with Image.open(picture) as image:
                assert len(image.convert("RGB").getcolors(2**24)) > colours, f"{page} is blank"
        dumped = subprocess.run(
            [*common, "--dump-dom", f"{address}/hooks/mamba.html"],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        assert '<pre class="mermaid"' not in dumped and '<div class="mermaid"' in dumped, "the diagram is drawn"
    finally:
        server.shutdown()
        server.server_close()
