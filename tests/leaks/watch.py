# SPDX-License-Identifier: Apache-2.0
"""Collects the secrets, errors, log lines and files of one test, and compares them."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tests.leaks.allowed import FILES, frame_is_left_out, line_is_left_out
from tests.leaks.known import FOR_ALL_TESTS, forms, forms_of_key

TESTS = Path(__file__).parents[1]
_LARGEST_FILE = 1 << 20
_MOST_FILES = 500


class LeakWatch:
    """What one test has, and what it has shown."""

    def __init__(self) -> None:
        self.secrets: set[str] = set()
        self.keys: list[object] = []
        self.errors: list[BaseException] = []
        self.lines: list[str] = []
        self.written: dict[str, bool] = {}
        self.contents: list[tuple[str, str]] = []

    def note(self, value: object) -> None:
        """Watch for a secret."""
        self.secrets.update(forms(value))

    def note_key(self, key: object) -> None:
        """Watch for a private key; its forms are made where there is something to compare."""
        self.keys.append(key)

    def note_error(self, error: BaseException) -> None:
        """Look at an error when the test is over."""
        self.errors.append(error)

    def forget_error(self, error: BaseException) -> None:
        """Another error takes its place."""
        self.errors[:] = [one for one in self.errors if one is not error]

    def note_record(self, record: logging.LogRecord) -> None:
        """Look at a log line as a handler would write it."""
        if line_is_left_out(record):
            return
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = f"{record.msg} {record.args!r}"
        if record.exc_info and record.exc_info[1]:
            text += "".join(traceback.format_exception(record.exc_info[1]))
            if record.name.startswith("d1_signer"):
                self.errors.append(record.exc_info[1])  # a crash reporter takes its frames too
        self.lines.append(text)

    def note_written(self, path: str, *, ours: bool) -> None:
        """A file is being written, by our code or by what may hold secrets."""
        # Python's own copies of the sources hold their texts.
        self.written[path] = ours and "/__pycache__/" not in path

    def note_removed(self, path: str) -> None:
        """A file of ours is about to go: look at it now."""
        if self.written.get(path):
            self.contents += _texts_of_file(path)

    def note_renamed(self, path: str, name: str) -> None:
        """A file has another name from now on, and is still of whoever has written it."""
        self.note_removed(path)
        if path in self.written:
            self.written[name] = self.written[path]

    def leaks(self, folder: Path | None = None) -> list[str]:
        """What shows a secret, cut to the place; also in the files below the test's folder."""
        told = [(f"log: {line[:60]}", line) for line in self.lines]
        for error in self.errors:
            told += [(f"error: {type(error).__name__}", text) for text in told_by(error)]
        told += self.contents
        for path in self._files(folder):
            told += _texts_of_file(path)
        if not told:
            return []
        everything = "\0".join(text for _, text in told)
        shown = [one for one in self.known_secrets() if one in everything]
        return [
            f"{where}: {one!r} in …{text[max(text.index(one) - 80, 0) :][: len(one) + 100]}…"
            for where, text in told
            for one in shown
            if one in text
        ]

    def known_secrets(self) -> set[str]:
        """Every form of every secret."""
        for key in self.keys:
            self.secrets.update(forms_of_key(key))
        self.keys.clear()
        return self.secrets | FOR_ALL_TESTS

    def _files(self, folder: Path | None) -> Iterator[str]:
        yield from (path for path, ours in self.written.items() if ours)
        if folder is None:
            return
        for path in islice(map(str, folder.rglob("*")), _MOST_FILES):
            # Under the name that it was written by, where links lead to it.
            told = {path, os.path.realpath(path)} & self.written.keys()
            if not told and Path(path).name not in dict(FILES):
                yield path


def _texts_of_file(path: str) -> list[tuple[str, str]]:
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_FILE:
            return []
        content = Path(path).read_bytes()
    except OSError:
        return []
    return [(f"file: {path}", content.decode(errors="replace")), (f"file: {path}", repr(content))]


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
            texts += [repr(item), *_report(item)]
            todo += [*_held_by_frames(item), item.__cause__, item.__context__, *item.args]
            todo += [*getattr(item, "__dict__", {}).values(), *getattr(item, "__notes__", ())]
            # What a UnicodeError, a JSONDecodeError or an OSError carries beside its text.
            todo += [getattr(item, name, None) for name in ("object", "doc", "filename")]
            if isinstance(item, BaseExceptionGroup):
                todo += item.exceptions
        elif isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            todo += item
        elif isinstance(item, str):
            texts.append(item)
        elif isinstance(item, bytes | bytearray):
            texts += [item.decode(errors="replace"), repr(item)]
        else:
            texts.append(repr(item))
            # A request or an answer of an HTTP library.
            texts += [str(getattr(item, name, "")) for name in ("url", "headers", "body")]
    return texts


def _report(error: BaseException) -> Iterator[str]:
    """The error's own text and frames; its chain and the members of a group are seen to apart."""
    report = traceback.TracebackException(type(error), error, error.__traceback__, compact=True)
    report.__cause__ = report.__context__ = None
    # What a test holds in its own hands, or says in its lines, is no leak.
    report.stack[:] = [one for one in report.stack if not one.filename.startswith(str(TESTS))]
    report.exceptions = None
    yield from report.format(chain=False)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code.co_filename
        if not code.startswith(str(TESTS)) and not frame_is_left_out(code):
            for name, value in frame.f_locals.items():
                with contextlib.suppress(Exception):  # its making was cut off: nothing shows it
                    yield f"{name} = {value!r}"


def _held_by_frames(error: BaseException) -> list[BaseException]:
    """Exceptions in the variables of its frames, which bring their own frames along."""
    found: list[BaseException] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(str(TESTS)):
            for value in frame.f_locals.values():
                held = value if isinstance(value, list | tuple) else [value]
                found += [one for one in held if isinstance(one, BaseException)]
    return found
