# SPDX-License-Identifier: Apache-2.0
"""`d1-signer audit show`: filters, and three forms of what is shown."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from d1_signer import Use
from d1_signer.audit import folder, record
from d1_signer.audit.showing import Filter, records
from d1_signer.audit.trail import AuditTrail
from d1_signer.cli import _audit_page
from tests.audit.trails import ORIGIN, records_file, watched_signer
from tests.cli.conftest import Run

FOREIGN = '"><script>alert(1)</script>\u202e'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A trail with three signatures for different things, and records of a second process."""
    place = tmp_path / "trail"
    for jti in ("one", "two"):
        with AuditTrail(place, origin=ORIGIN) as trail, watched_signer(trail) as signer:
            use = Use(purpose="d1-assertion", references=(("iss", "bank"), ("jti", jti)))
            signer.sign(b"x", use=use)
            signer.sign(b"y", use=Use(purpose=FOREIGN, references=((FOREIGN, FOREIGN),)))
    return place


def shown(run: Run, *arguments: str) -> list[dict[str, Any]]:
    result = run("audit", "show", *arguments, "--json")
    assert result.status == 0
    return [json.loads(line)["record"] for line in result.out.splitlines()]


def test_every_record_is_shown_without_a_filter(run: Run, place: Path) -> None:
    (instance,) = folder.instances(place)
    lines = records_file(place).read_text().splitlines()
    assert shown(run, str(place)) == [json.loads(line) for line in lines]
    text = run("audit", "show", str(instance))
    assert len(text.out.splitlines()) == len(lines)
    assert "<script>" in text.out
    assert "\u202e" not in text.out
    assert text.err.startswith("\nNothing of this was verified; d1-signer audit verify")


def test_filters_and_the_ends_of_what_they_find(run: Run, place: Path) -> None:
    one = shown(run, str(place), "--jti", "one")
    assert [record["event"] for record in one] == ["begin", "end"]
    assert one[1]["begin"] == one[0]["number"]
    assert ["jti", "one"] in one[0]["references"]
    assert len(shown(run, str(place), "--purpose", "d1-assertion")) == 4
    assert shown(run, str(place), "--jti", "one", "--purpose", "other") == []
    assert len(shown(run, str(place), "--kid", "bank-2026", "--jti", "two")) == 2
    assert shown(run, str(place), "--kid", "other") == []


def test_times(run: Run, place: Path) -> None:
    everything = shown(run, str(place))
    middle = everything[5]["time"]
    late = shown(run, str(place), "--from", middle)
    early = shown(run, str(place), "--until", middle)
    assert all(record["time"] >= middle for record in late)
    assert early == [record for record in early if record in everything]
    numbers = {record["number"] for record in early + late}
    assert numbers == {record["number"] for record in everything}
    assert shown(run, str(place), "--from", "2999-01-01") == []
    assert shown(run, str(place), "--until", "1999-01-01T00:00:00+02:00") == []
    assert run("audit", "show", str(place), "--from", "yesterday").status == 2


def test_lines_that_are_no_records_are_told(run: Run, place: Path) -> None:
    file = records_file(place)
    file.write_bytes(b'{"event":1}\nnot JSON\n[]\n' + file.read_bytes() + b'{"torn')
    result = run("audit", "show", str(place))
    assert result.status == 0
    assert "2 lines are no records" in result.err


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_all_and_asks_for_nothing(run: Run, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    result = run("audit", "show", str(place), "--html", str(file))
    assert result.status == 0
    content = file.read_text()
    page = _Page()
    page.feed(content)
    assert "script" not in page.tags
    assert not {"img", "link", "iframe", "object"} & {*page.tags}
    assert not {"src", "href", "srcset", "onload"} & {name for name, _ in page.attributes}
    assert "url(" not in content
    assert "default-src 'none'" in content
    assert "prefers-color-scheme: dark" in content
    assert page.text.count('"><script>alert(1)</script>\\u202e') == 6
    assert page.tags.count("rect") >= 1
    assert page.tags.count("tr") == 1 + len(
        [r for r in shown(run, str(place)) if r["event"] != "end"]
    )
    again = run("audit", "show", str(place), "--html", str(file))
    assert (again.status, file.read_text()) == (2, content)
    assert run("audit", "show", str(place), "--html", str(file), "--force").status == 0


def test_a_page_of_too_much_says_so(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_audit_page, "MOST_RECORDS", 3)
    found = [("instance", record) for record in shown(run, str(place))]
    assert "The first 3 are shown" in _audit_page.page(found)
    assert "<svg" not in _audit_page.page(found[:1])


def test_what_a_filter_finds_is_what_fits_record_by_record(place: Path) -> None:
    """Lines are passed over before they are read; that must leave out none that fits."""
    (instance,) = folder.instances(place)
    every = [shown.members or {} for shown in records([instance], Filter())]
    assert [record.encode(members) for members in every] == records_file(place).read_bytes().split(
        b"\n"
    )[:-1]
    times = [members["time"] for members in every]
    wanted = [
        Filter(kid=kid, jti=jti, purpose=purpose, earliest=earliest, latest=latest)
        for kid in (None, "bank-2026", 'a"b')
        for jti in (None, "one", "\ud800")
        for purpose in (None, FOREIGN, "d1-assertion")
        for earliest, latest in (("", None), (times[3], times[-3]), (times[-1], None))
    ]
    for each in wanted:
        fitting = [members for members in every if each.fits(members)]
        begun = {members["number"] for members in fitting if members["event"] == "begin"}
        ends = [members for members in every if members.get("begin") in begun]
        both = [members for members in every if members in fitting or members in ends]
        assert [shown.members for shown in records([instance], each)] == both


def test_force_is_for_a_page(run: Run, place: Path) -> None:
    result = run("audit", "show", str(place), "--force")
    assert result.status == 2
    assert "--force needs --html" in result.err
    assert result.out == ""
