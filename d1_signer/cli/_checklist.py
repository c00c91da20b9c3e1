# SPDX-License-Identifier: Apache-2.0
"""The steps of `d1-signer check`, and how they are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from d1_signer.cli._output import Output, explanation, printable, to_stdout
from d1_signer.errors import D1SignerError


class Status(StrEnum):
    """How a step ended."""

    OK = "ok"
    UNCLEAR = "unclear"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step that is over; ``subject`` is the key or the environment it was about.

    ``facts`` are told to machines only.
    """

    name: str
    subject: str
    status: Status
    detail: str = ""
    error: D1SignerError | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The step as JSON-ready values."""
        return {
            "step": self.name,
            "subject": self.subject,
            "status": str(self.status),
            "detail": self.detail,
            "error": self.error and self.error.to_dict(),
            **self.facts,
        }


@dataclass(slots=True)
class Checklist:
    """The steps so far; each is told as it ends, since the next one may take long."""

    output: Output
    steps: list[Step] = field(default_factory=list)
    _subject: str = ""

    def begin(self, subject: str) -> None:
        """Turn to a key or to the environment."""
        self._subject = subject
        self._tell(printable(subject))

    def ok(self, name: str, detail: str = "", **facts: str) -> None:
        """A step has passed."""
        self._add(name, Status.OK, detail, facts=facts)

    def unclear(self, name: str, detail: str, **facts: str) -> None:
        """A step tells neither way; a later one decides."""
        self._add(name, Status.UNCLEAR, detail, facts=facts)

    def skipped(self, name: str, reason: str) -> None:
        """A step was not taken."""
        self._add(name, Status.SKIPPED, reason)

    def failed(self, name: str, error: D1SignerError, **facts: str) -> None:
        """A step has failed; tells what to do."""
        self._add(name, Status.FAILED, error.message, error=error, facts=facts)
        for line in explanation(error):
            self._tell(f"           {line}")

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Run a step: it has passed unless one of our errors ends it.

        Gives a function that takes the step's detail; the error is kept and not raised.
        """
        details: list[str] = []
        try:
            yield details.append
        except D1SignerError as error:
            self.failed(name, error)
        else:
            self.ok(name, ", ".join(details))

    @property
    def first_failure(self) -> Step | None:
        """The step at which it stopped."""
        return next((step for step in self.steps if step.status is Status.FAILED), None)

    def passed(self) -> bool:
        """Whether the last step passed."""
        return self.steps[-1].status is Status.OK

    def _add(
        self,
        name: str,
        status: Status,
        detail: str,
        *,
        error: D1SignerError | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        step = Step(
            name=name,
            subject=self._subject,
            status=status,
            detail=detail,
            error=error,
            facts=facts or {},
        )
        self.steps.append(step)
        self._tell(f"  {step.status:<7}  {step.name:<18}  {printable(step.detail)}".rstrip())

    def _tell(self, line: str) -> None:
        if not self.output.json:
            to_stdout(line)
