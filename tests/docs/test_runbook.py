# SPDX-License-Identifier: Apache-2.0
"""The runbook has every error, every answer of D1 and every warning, and sends nobody astray."""

from __future__ import annotations

import ast
import re

import pytest

from d1_signer import errors
from d1_signer.secret import Secret
from d1_signer.token import response
from tests.docs.reading import (
    LEVELS,
    ROOT,
    anchors,
    error_kinds,
    log_lines,
    modules,
    rows,
    section,
)

PAGE = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
EVENTS = section((ROOT / "docs" / "observability.md").read_text(encoding="utf-8"), "Log events")
CLOUDS = ("awskms", "gcpkms", "hashivault")
# The sandbox is no part of a service; what it logs are its answers.
LINES = [line for line in log_lines() if not line.logger.startswith("d1_signer.sandbox")]
TITLES = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
ADVICE = [
    row
    for title in TITLES[TITLES.index("Error codes") + 1 : TITLES.index("Units and manifests")]
    for row in rows(section(PAGE, title), 3)
]


def names(text: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+\.[a-z0-9_]+)`", text))


def each_of(event: str) -> list[str]:
    return [event.replace("%s", cloud) for cloud in CLOUDS] if "%s" in event else [event]


def test_every_line_of_the_log_begins_with_an_event() -> None:
    assert len(LINES) > 45
    assert [line.place for line in LINES if not line.event or line.level not in LEVELS] == []


def test_the_table_of_events_is_that_of_the_code() -> None:
    told: dict[str, tuple[str, set[str]]] = {}
    logger = ""
    for *first, events, level, meaning in [*rows(EVENTS, 4), *rows(EVENTS, 3)]:
        if first and first[0]:
            logger = re.findall(r"`([\w.]+)`", first[0])[0]
        assert meaning
        for event in names(events):
            assert event not in told, event
            below = logger if first else "d1_signer.backends"
            told[event] = (below, set(level.split(" or ")))
    logged: dict[str, set[str]] = {}
    for line in LINES:
        for event in each_of(line.event):
            logged.setdefault(event, set()).add(line.level)
            where = told.get(event, ("", set()))[0]
            assert line.logger == where or line.logger.startswith(f"{where}."), event
    assert {event: levels for event, (_, levels) in told.items()} == logged


def test_every_warning_has_a_row_that_says_what_to_do() -> None:
    dealt_with = {event for seen, cause, do in ADVICE if cause and do for event in names(seen)}
    wanted = {
        event
        for line in LINES
        if line.level in {"warning", "error"}
        for event in each_of(line.event)
    }
    assert wanted - dealt_with == set()
    assert dealt_with - {event for line in LINES for event in each_of(line.event)} == set()


def test_the_table_of_codes_is_that_of_the_code() -> None:
    told = {row[0].strip("`"): row[1] == "yes" for row in rows(section(PAGE, "Error codes"), 4)}
    assert told == {error.code: error.retryable for error in error_kinds()}
    # What is read from the source is what the classes are.
    assert {kind.code for kind in subclasses(errors.D1SignerError)} <= set(told)


def subclasses(kind: type[errors.D1SignerError]) -> set[type[errors.D1SignerError]]:
    below = set().union(*(subclasses(each) for each in kind.__subclasses__()), {kind})
    return {each for each in below if each.__module__.startswith("d1_signer.")}


def test_every_code_has_a_first_step() -> None:
    for code, _, means, step in rows(section(PAGE, "Error codes"), 4):
        assert means
        assert step or "never by itself" in means, code
        # Somebody is called at night: what to do, in words, and not a place or a thing.
        assert not step or step.split()[0] in DOING, code


DOING = set(
    "Ask Choose Compare Correct Find Install Keep Look Make Name Read Tell Type".split()  # noqa: SIM905
)


def test_the_codes_and_the_alerts_are_found_first() -> None:
    assert TITLES[:3] == ["First", "Alerts", "Error codes"]


def test_no_step_leans_on_the_row_above() -> None:
    """Who comes by a code or an alert reads one row."""
    for cells in [*ADVICE, *rows(section(PAGE, "Error codes"), 4)]:
        assert not {"the same", "as above"} & set(cells), cells


def statuses(cell: str) -> set[int]:
    found: set[int] = set()
    for first, last in re.findall(r"(\d{3})(?:-(\d{3}))?", cell):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_what_d1_answers_is_told_for_each_status() -> None:
    told: dict[int, tuple[str, bool]] = {}
    for numbers, code, again, means in rows(section(PAGE, "What D1 answers"), 4):
        assert means
        for status in statuses(numbers):
            assert status not in told, status
            told[status] = (code.strip("`"), again == "yes")
    assert set(told) == {200, *range(300, 600)}
    for status, expected in told.items():
        if status == 200:
            with pytest.raises(errors.TokenResponseError):
                response.read_grant(b"{}", assertion=Secret("x"))
            continue
        error = response.error_from(status, b"", assertion=Secret("x"), retry_after=None)
        assert (error.code, error.retryable) == expected, status


def test_every_error_of_oauth_is_told() -> None:
    told = {row[0].strip("`") for row in rows(section(PAGE, "What D1 answers"), 3)}
    # RFC 6749 section 5.2, all of it.
    assert told == {
        "invalid_request",
        "invalid_client",
        "invalid_grant",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
    }
    assert set(response._HINTS) <= told


def test_codes_in_the_text_exist() -> None:
    known = {error.code for error in error_kinds()}
    for seen, _, _ in ADVICE:
        for word in re.findall(r"`([a-z]+_[a-z_]+)`", seen):
            details = {"hanging_in", "busy_sessions", "clock_offset", "invalid_grant"}
            assert word in known | details, word


@pytest.mark.parametrize("name", ["runbook", "onboarding", "observability"])
def test_links_to_headings_lead_there(name: str) -> None:
    page = ROOT / "docs" / f"{name}.md"
    for target in re.findall(r"\]\(([^)]*#[^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            there = page if not file else page.parent / file
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def test_words_that_are_seen_are_those_of_the_code() -> None:
    """What stands in quotation marks: a text of the package, or of the table of tls.md, whose
    test provokes each of its rows.
    """
    texts = " ".join(
        node.value
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    texts += (ROOT / "docs" / "tls.md").read_text(encoding="utf-8")
    phrases = [
        part.strip()
        for seen, _, _ in ADVICE
        for phrase in re.findall(r'"([^"]+)"', seen)
        for part in phrase.split("…")
    ]
    assert len(phrases) > 8
    assert [phrase for phrase in phrases if phrase not in texts] == []


def test_the_twelve_faults_of_a_night_are_there() -> None:
    """What an exercise plants; each is found by what the log or the status shows."""
    seen = " ".join(cell for row in ADVICE for cell in row)
    for sign in (
        "expired",  # the client certificate
        "invalid_grant",  # kid, key or issuer id
        "clock_offset",
        "pkcs11.away",
        "busy_sessions",  # the HSM hangs
        "pkcs11.pin_refused_after_it_worked",
        "status=503",
        "HTTP 407",
        "fleet.store_unavailable",  # Redis hangs
        "fleet.token_unreadable",  # another store key
        "key_disabled",
        "issuer id",
    ):
        assert sign in seen, sign
