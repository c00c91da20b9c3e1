# SPDX-License-Identifier: Apache-2.0
"""How credentials are looked for where threads are short, or where searches never end."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from d1_signer import errors
from d1_signer.backends import renewal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class _Tickets(renewal.Renewed[float]):
    """Credentials that are the moment of their end."""

    what = "tickets"

    def __init__(self) -> None:
        super().__init__()
        self.life = 60.0
        self.begun = 0
        self.may_end = threading.Event()
        self.may_end.set()

    def find(self, ask: renewal.Ask) -> float:  # noqa: ARG002
        self.begun += 1
        assert self.may_end.wait(60)
        return time.monotonic() + self.life

    def is_ageing(self, held: float) -> bool:
        return held - time.monotonic() < 30.0

    def is_over(self, held: float) -> bool:
        return held < time.monotonic()

    def are_same(self, held: float, other: float) -> bool:
        return held == other

    def not_in_time(self) -> errors.SignerTimeout:
        return errors.SignerTimeout("The search for tickets is late.")


@pytest.fixture
def tickets(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Tickets]:
    monkeypatch.setattr(renewal, "_PAUSE", 0.0)
    monkeypatch.setattr(renewal, "_PATIENCE", 0.0)
    tickets = _Tickets()
    yield tickets
    tickets.may_end.set()
    for thread in _searching():
        thread.join(20)


def _searching() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "d1-signer-credentials"]


def _no_thread(_: threading.Thread) -> None:
    msg = "can't start new thread"
    raise RuntimeError(msg)


def _soon() -> float:
    return time.monotonic() + 0.01


def _later() -> float:
    return time.monotonic() + 20.0


def _nobody(question: str) -> str:
    raise AssertionError(question)


def test_good_credentials_serve_where_no_thread_can_be_started(
    tickets: _Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets.life = 20.0  # ageing from the beginning, and good
    held = tickets.get(_later())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        assert tickets.get(_soon()) == held


@pytest.mark.parametrize("way", ["get", "open", "replaced"])
def test_missing_thread_is_told_and_the_next_call_looks_again(
    tickets: _Tickets, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(renewal, "_PAUSE", 60.0)
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: tickets.get(_later()),
        "open": lambda: tickets.open(_later(), _nobody),
        "replaced": lambda: tickets.replaced(0.0, _later()),
    }
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(errors.SignerUnavailable, match="No thread can be started") as caught:
            calls[way]()
    assert caught.value.retryable
    assert caught.value.details == {"phase": "credentials"}
    calls[way]()
    assert tickets.begun == 1


def test_searches_that_hang_are_four_at_most(tickets: _Tickets) -> None:
    tickets.may_end.clear()
    for _ in range(10):
        with pytest.raises(errors.SignerTimeout, match="is late"):
            tickets.get(_soon())
        with pytest.raises(errors.SignerTimeout, match="is late"):
            tickets.open(_soon(), _nobody)
    assert len(_searching()) == tickets.begun == 4
    # They end after all: what they found is held, and later on there are searches again.
    tickets.may_end.set()
    held = tickets.get(_later())
    for thread in _searching():
        thread.join(20)
    assert tickets.replaced(tickets.held() or held, _later())
    assert tickets.begun == 5


def _late_search(tickets: _Tickets) -> tuple[Any, threading.Event]:
    """A search that has found something, and ends when the event is set."""
    ends = threading.Event()
    find = tickets.find

    def late(ask: renewal.Ask) -> float:
        found = find(ask)
        assert ends.wait(60)
        return found

    tickets.find = late  # type: ignore[method-assign]
    with pytest.raises(errors.SignerTimeout):
        tickets.get(_soon())
    (first,) = tickets._searches.get()._under_way
    tickets.find = find  # type: ignore[method-assign]
    return first, ends


def test_search_that_ends_late_does_not_replace_what_a_later_one_found(tickets: _Tickets) -> None:
    first, ends = _late_search(tickets)
    newer = tickets.get(_later())
    ends.set()
    assert first.over.wait(20)
    assert tickets.held() == newer
    assert first.found == newer  # for those who had waited for it


def test_search_that_ends_late_replaces_what_has_ended_meanwhile(tickets: _Tickets) -> None:
    first, ends = _late_search(tickets)
    tickets.life = 0.05
    short = tickets.get(_later())
    while not tickets.is_over(short):
        time.sleep(0.01)
    ends.set()
    assert first.over.wait(20)
    held = tickets.held()
    assert held is not None
    assert held > short


def test_service_that_refuses_begins_no_fifth_search(tickets: _Tickets) -> None:
    held = tickets.get(_later())
    tickets.may_end.clear()
    for _ in range(10):
        with pytest.raises(errors.SignerTimeout, match="is late"):
            tickets.replaced(held, _soon())
    assert len(_searching()) == 4


def test_an_answer_of_the_person_who_opens_reaches_the_search() -> None:
    class Asking(_Tickets):
        def find(self, ask: renewal.Ask) -> float:
            answers.extend([ask("The code?"), ask("The next one?")])
            return super().find(ask)

    answers: list[str] = []
    asked: list[str] = []

    def person(question: str) -> str:
        asked.append(question)
        return f"{len(asked)}23456"

    assert Asking().open(_later(), person) >= 0.0
    assert asked == ["The code?", "The next one?"]
    assert answers == ["123456", "223456"]


def test_who_does_not_answer_ends_the_question_in_the_search_and_here() -> None:
    class Asking(_Tickets):
        def find(self, ask: renewal.Ask) -> float:
            with pytest.raises(renewal.NobodyToAskError):
                ask("The code?")
            refused.set()
            return super().find(ask)

    refused = threading.Event()

    def person(_: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Asking().open(_later(), person)
    assert refused.wait(20)
    for thread in _searching():
        thread.join(20)
