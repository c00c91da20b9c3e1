# SPDX-License-Identifier: Apache-2.0
"""Doing something with a key between two records of an audit trail."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from d1_signer.custody.evidence import ANSWERS, Evidence
from d1_signer.errors import AuditError, ConfigurationError, D1SignerError
from d1_signer.events import Recordable, Trail, Use, current_span


def checked_trail(trail: object) -> None:
    """Refuse what is no trail.

    Raises:
        ConfigurationError: It is none.
    """
    methods = ("begin", "end", "note", "watch")
    if trail is not None and not all(callable(getattr(trail, name, None)) for name in methods):
        raise ConfigurationError(
            "trail is not an audit trail.", hint="Write trail=AuditTrail(folder, origin=…)."
        )


@contextlib.contextmanager
def recorded(
    trail: Trail | None,
    action: str,
    about: Mapping[str, Recordable],
    deadline: float | None = None,
) -> Iterator[dict[str, Recordable]]:
    """Do what is inside once its beginning is recorded, and record how it ended.

    Gives a dictionary for what is known at its end.

    Raises:
        AuditUnavailable: It cannot be recorded: nothing was done, or its result must not be used.
    """
    found: dict[str, Recordable] = {}
    if trail is None:
        yield found
        return
    begun = trail.begin(action, _traced(about), deadline=deadline)
    try:
        yield found
    except BaseException as failure:
        outcome = failure.code if isinstance(failure, D1SignerError) else "interrupted"
        with contextlib.suppress(AuditError):  # the first error is the one to tell
            trail.end(begun, outcome, found)
        raise
    trail.end(begun, "done", found)


def _traced(about: Mapping[str, Recordable]) -> Mapping[str, Recordable]:
    """With the current span among the references, where there is one."""
    span = current_span()
    if span is None:
        return about
    given = about.get("references")
    references = given if isinstance(given, tuple) else ()
    return {**about, "references": (*references, ("trace_id", span[0]), ("span_id", span[1]))}


def described(use: Use | None) -> dict[str, Recordable]:
    """What a caller said that a signature is for."""
    if use is None:
        return {}
    return {"purpose": use.purpose, "references": use.references}


def answers(evidence: Evidence) -> dict[str, Recordable]:
    """What evidence says in short."""
    return {name: getattr(evidence, name) for name in ANSWERS}
