# SPDX-License-Identifier: Apache-2.0
"""What holds for the whole suite: no secret gets into an error, a log line or a file."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest

from tests.leaks import hooks
from tests.leaks.watch import LeakWatch, told_by

# A shell starts what runs in its background with both ignored, which programs under test would
# inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

__all__ = ["LeakWatch", "told_by"]

pytest_plugins = ["d1_signer.testing"]

hooks.watch_values()
hooks.watch_public_calls()


def pytest_collection_finish() -> None:
    """By now the test modules have imported what is loaded late."""
    hooks.watch_public_calls()


@pytest.fixture(autouse=True)
def leak_watch(request: pytest.FixtureRequest) -> Iterator[LeakWatch]:
    """Fail the test in which a PIN, a passphrase, a key, an assertion or a token shows."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.DEBUG)
    watch = hooks.begin()
    yield watch
    hooks.end()
    root.setLevel(before)
    leaks = watch.leaks(request.node.funcargs.get("tmp_path"))
    assert not leaks, "a secret shows in:\n" + "\n".join(leaks)
