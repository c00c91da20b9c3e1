# SPDX-License-Identifier: Apache-2.0
"""The site is made without a network and without a warning, and holds together by itself."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import d1_signer
from d1_signer import sandbox, testing

pytestmark = pytest.mark.timeout(600)  # Sphinx works for some ten seconds, more on a loaded machine

ROOT = Path(__file__).parents[2]
# Sphinx, in a process that may not look for a host nor connect to one.
OFFLINE = """
import sys

def refuse(event, arguments):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}:
        raise PermissionError(f"{event} {arguments}")

sys.addaudithook(refuse)
from sphinx.cmd.build import main

sys.exit(main(sys.argv[1:]))
"""
# What a browser loads by itself, unlike what a reader may follow.
LOADED = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("img", "srcset"),
    ("source", "src"),
    ("iframe", "src"),
    ("object", "data"),
    ("video", "src"),
    ("form", "action"),
}


def build(source: Path, out: Path, builder: str = "html") -> subprocess.CompletedProcess[str]:
    strict = ["-W", "--keep-going", "-q", "-b", builder, "-d", str(out.with_suffix(".cache"))]
    return subprocess.run(
        [sys.executable, "-c", OFFLINE, *strict, "-c", str(source / "docs/site"), source, out],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"id", "name"} and value:
                self.anchors.add(value)
            if name in {"href", "src"} and value:
                self.links.add(value)
            if (tag, name) in LOADED and value:
                self.loaded.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "site" / "html"
    out.parent.mkdir(exist_ok=True)
    with (out.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # made once, whoever of the workers comes first
        if not (out.parent / "made").exists():
            made = build(ROOT, out)
            assert (made.returncode, made.stderr) == (0, ""), made.stderr
            (out.parent / "made").touch()
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_no_link_is_dead(site: Path, pages: dict[Path, Page]) -> None:
    dead = []
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            followed += 1
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not (target.is_file() and target.is_relative_to(site)):
                dead.append((path.name, link))
            elif url.fragment and target.suffix == ".html":
                anchors = pages[target].anchors
                dead += [(path.name, link)] * (unquote(url.fragment) not in anchors)
    assert followed > 5000
    assert dead == []


def test_a_browser_asks_nobody_outside(site: Path, pages: dict[Path, Page]) -> None:
    loaded = {value for page in pages.values() for value in page.loaded}
    assert any(value.endswith(".js") for value in map(str, loaded))
    outside = re.compile(r"\s*(https?:|wss?:|ftp:|//)", re.IGNORECASE)
    assert [value for value in loaded if outside.match(value)] == []
    for path in [*site.rglob("*.css"), *pages]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"url\(([^)]*)\)|@import\s+([^;]*)", text)
        assert [n for n in named if "//" in "".join(n) and "data:" not in "".join(n)] == [], path
    for path in site.rglob("*.js"):
        if path.name != "searchindex.js":
            # Addresses stand in comments and as names of XML; nothing is made of them.
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?:fetch|import|open)\(\s*[\"'`](?:https?:)?//", text), path
            assert not re.search(r"\.(?:src|href)\s*=\s*[\"'`](?:https?:)?//", text), path


def test_every_public_name_has_an_entry(pages: dict[Path, Page]) -> None:
    anchors = {anchor for page in pages.values() for anchor in page.anchors}
    public = {f"d1_signer.{name}" for name in dir(d1_signer)}
    assert len(public) > 70
    assert public - {"d1_signer.es256"} - anchors == set()
    for module in (sandbox, testing):
        assert {f"{module.__name__}.{name}" for name in module.__all__} - anchors == set()
    for name in (
        "module-d1_signer.es256",
        "d1_signer.es256.raw_from_der",
        "d1_signer.TokenFetcher.token",  # inherited from a class without a page
        "d1_signer.sandbox.Sandbox.misbehave",
        "d1_signer.otel.OpenTelemetryObserver",
    ):
        assert name in anchors


def test_a_page_of_the_reference_begins_with_its_names(site: Path) -> None:
    page = (site / "docs/site/reference/events.html").read_text(encoding="utf-8")
    before = page.partition('<dl class="py')[0]
    for name in ("SignEvent", "RenewalEvent"):
        assert f'href="#d1_signer.{name}"' in before


def test_an_annotation_leads_to_the_public_name(site: Path) -> None:
    page = (site / "docs/site/reference/tokens.html").read_text(encoding="utf-8")
    signature = page[page.index('id="d1_signer.TokenFetcher"') :].partition("</dt>")[0]
    for target in ("keys.html#d1_signer.SignerSet", "#d1_signer.Environment"):
        assert f'href="{target}"' in signature


def test_an_alias_of_types_is_described_in_our_words(site: Path) -> None:
    for name, page, words in (
        ("SecretSource", "keys", "or a callable that returns the secret"),
        ("Observer", "events", "Called in the thread where the event happened"),
    ):
        text = (site / f"docs/site/reference/{page}.html").read_text(encoding="utf-8")
        entry = text[text.index(f'id="d1_signer.{name}"') :].partition("</dl>")[0]
        assert words in entry


def test_a_signature_shows_nothing_that_means_nothing(pages: dict[Path, Page]) -> None:
    for path in pages:
        if path.parent.name == "reference":
            text = re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))
            assert "(*args, **kwargs)" not in text, path
            assert not re.search(r"&lt;[\w.]+ object", text), path


def test_no_type_is_shown_with_the_module_that_defines_it(pages: dict[Path, Page]) -> None:
    reference = [path for path in pages if path.parent.name == "reference"]
    assert len(reference) >= 7
    for path in reference:
        assert not re.search(r"<em>d1_signer\.", path.read_text(encoding="utf-8")), path


def test_a_cell_tells_the_head_of_its_column(site: Path) -> None:
    """On a phone no head is above it."""
    page = (site / "docs/runbook.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<td data-label="cause: "', page)) > 50
    for table in re.findall(r"<table\b.*?</table>", page, re.DOTALL):
        heads = re.findall(r"<th\b[^>]*><p>(.*?)</p>", table)
        body = table.partition("<tbody>")[2]
        for row in re.findall(r"<tr\b.*?</tr>", body, re.DOTALL):
            labels = re.findall(r'<td data-label="(.*?): "', row)
            plain = [re.sub("<[^>]+>", "", head) for head in heads]
            assert labels == (plain if len(heads) > 2 else [])


def test_what_is_for_users_is_found_first(site: Path) -> None:
    weights = (site / "_static/language_data.js").read_text(encoding="utf-8")
    told = re.search(r"const INSIDE = /\^\((.*)\)/;", weights)
    assert told
    found = json.loads(
        (site / "searchindex.js").read_text(encoding="utf-8")[len("Search.setIndex(") : -1]
    )["docnames"]
    for name in told[1].replace("\\/", "/").split("|"):
        assert any(re.match(name, page) for page in found), name


def test_no_description_of_a_property_is_taken_for_its_type(pages: dict[Path, Page]) -> None:
    for path in pages:
        assert not re.search(r"<dt[^>]*>Type<", path.read_text(encoding="utf-8")), path


def test_the_search_knows_every_page_and_its_words(site: Path) -> None:
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    markdown = {
        str(path.relative_to(ROOT).with_suffix(""))
        for folder in ("docs", "softhsm")
        for path in (ROOT / folder).rglob("*.md")
    }
    assert markdown | {"README", "SECURITY"} <= set(index["docnames"])

    def having(word: str) -> set[str]:
        found = index["terms"][word]
        return {index["docnames"][n] for n in ([found] if isinstance(found, int) else found)}

    assert "docs/pkcs11/answers" in having("ckr_pin_incorrect")
    assert "docs/site/reference/errors" in having("signer_throttl")  # its stem


def test_the_first_page_is_the_readme(site: Path) -> None:
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of all that the site is made from, without the folders that `make` writes."""
    made = {".git", ".venv", "build", "dist", "__pycache__"}
    source = tmp_path / "copy"
    shutil.copytree(ROOT, source, ignore=lambda _, names: [n for n in names if n in made | CACHES])
    return source


CACHES = {".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".import_linter_cache"}


def test_what_is_dead_is_told_and_a_new_page_needs_no_place(copy: Path, tmp_path: Path) -> None:
    (copy / "docs/brand-new.md").write_text("# New\n\n[a page](token.md)\n")
    (copy / "docs/pkcs11/brand-new.md").write_text(
        "# New\n\n[no page](nowhere.md), [no anchor](answers.md#nowhere), [no folder](../none)\n"
    )
    (copy / "docs/deploy").mkdir()
    (copy / "docs/deploy/brand-new.md").write_text("# New\n\n[itself](#nowhere)\n")
    made = build(copy, tmp_path / "out", "dummy")
    assert made.returncode == 1
    told = re.findall(r"^(\S+?):\d+: WARNING: (.*)$", made.stderr, re.MULTILINE)
    assert sorted((Path(path).parent.name, text.split("'")[-2]) for path, text in told) == [
        ("deploy", "nowhere"),
        ("pkcs11", "../none"),
        ("pkcs11", "nowhere"),
        ("pkcs11", "nowhere.md"),
    ], made.stderr
