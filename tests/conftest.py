# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole suite: no secret gets into a log line or into an error."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from d1_signer import errors, secret
from d1_signer.token import response as token_response

pytest_plugins = ["d1_signer.testing"]

TESTS = Path(__file__).parent
# Shorter values occur by chance in ports, times and lengths.
_SHORTEST = 8


class LeakWatch(logging.Handler):
    """Collects secrets, errors and log lines of one test, and compares them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.secrets: set[str] = set()
        self.errors: list[BaseException] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("authlib"):
            return  # a server of the tests that logs what it issues
        if record.name.startswith("botocore") and record.levelno == logging.DEBUG:
            return  # its requests, session token and all: see docs/cloud/aws.md
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += "".join(traceback.format_exception(record.exc_info[1]))
        self.lines.append(text)

    def note(self, value: object) -> None:
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        if len(text) >= _SHORTEST:
            self.secrets.add(text)
            # The signature alone makes an assertion out of claims that may be known.
            if text.count(".") == 2:
                self.secrets.add(text.rpartition(".")[2])

    def leaks(self) -> list[str]:
        texts = list(self.lines)
        for error in self.errors:
            texts += told_by(error)
        return [text for text in texts if any(secret in text for secret in self.secrets)]


def told_by(error: BaseException) -> list[str]:
    """All that a logger, a crash reporter or a curious caller could read from an error."""
    texts: list[str] = []
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        item = todo.pop()
        if id(item) in seen or item is None:
            continue
        seen.add(id(item))
        if isinstance(item, BaseException):
            report = traceback.TracebackException.from_exception(item, capture_locals=True)
            for frame in report.stack:
                if frame.filename.startswith(str(TESTS)):
                    frame.locals = None  # what a test holds in its own hands is no leak
            todo += _held_by_frames(item)
            texts += [repr(item), *report.format()]
            todo += [item.__cause__, item.__context__, *item.args, *vars(item).values()]
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            todo += item
        elif isinstance(item, str | bytes):
            texts.append(item if isinstance(item, str) else item.decode(errors="replace"))
        elif hasattr(item, "body"):
            texts.append(str(item.body))
    return texts


def _held_by_frames(error: BaseException) -> list[BaseException]:
    """Exceptions in the variables of its frames, which bring their own frames along."""
    found: list[BaseException] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(str(TESTS)):
            for value in frame.f_locals.values():
                held = value if isinstance(value, list | tuple) else [value]
                found += [one for one in held if isinstance(one, BaseException)]
    return found


@pytest.fixture(autouse=True)
def leak_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[LeakWatch]:
    """Fail the test in which a PIN, a passphrase, an assertion or a token shows."""
    watch = LeakWatch()
    make_secret, make_grant = secret.Secret.__init__, token_response.Grant.__init__
    make_error, make_fresh = errors.D1SignerError.__init__, errors.D1SignerError.fresh

    def noting_secret(self: secret.Secret, value: str) -> None:
        watch.note(value)
        make_secret(self, value)

    def noting_grant(self: token_response.Grant, **members: object) -> None:
        watch.note(members["value"])
        make_grant(self, **members)  # type: ignore[arg-type]

    def noting_error(self: errors.D1SignerError, *args: object, **options: object) -> None:
        watch.errors.append(self)
        make_error(self, *args, **options)  # type: ignore[arg-type]

    def noting_fresh(self: errors.D1SignerError) -> errors.D1SignerError:
        # The copy is what the caller gets; the original ends here, and its traceback with it.
        twin = make_fresh(self)
        watch.errors[:] = [error for error in watch.errors if error is not self]
        watch.errors.append(twin)
        return twin

    monkeypatch.setattr(errors.D1SignerError, "fresh", noting_fresh)
    monkeypatch.setattr(secret.Secret, "__init__", noting_secret)
    monkeypatch.setattr(token_response.Grant, "__init__", noting_grant)
    monkeypatch.setattr(errors.D1SignerError, "__init__", noting_error)
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.DEBUG)
    root.addHandler(watch)
    yield watch
    root.removeHandler(watch)
    root.setLevel(before)
    leaks = watch.leaks()
    assert not leaks, "a secret shows in:\n" + "\n".join(leaks)
