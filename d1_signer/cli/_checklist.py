# SPDX-License-Identifier: Apache-2.0
"""The steps of `d1-signer check`, and how they are told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from d1_signer.cli._output import Output, explanation, printable
from d1_signer.errors import ConfigurationError, D1SignerError

CERTIFICATE = "client-certificate"
ENDPOINT = "endpoint"
ACCESS_TOKEN = "access-token"  # noqa: S105 (a step's name)
STORE = "store"

_PKCS11 = "a key URI that begins with pkcs11:"
_TRAIL = "--audit-trail"
# What has to be given for a step.
_NEEDS = {
    "module": _PKCS11,
    "token": _PKCS11,
    "login": f"{_PKCS11}, with pin-source in it",
    "audit-record": _TRAIL,
    "audit-folder": _TRAIL,
    "audit-seal": f"{_TRAIL} and --audit-key",
    CERTIFICATE: "--client-cert and --client-key",
    ENDPOINT: "--environment",
    ACCESS_TOKEN: "--environment, --issuer-id and a key that works",
    STORE: "--config FILE, whose table [store] names the store",
}


_IF_UNCLEAR = {
    CERTIFICATE: "Look at this machine's clock; where it is right, have Thales sign a new one from "
    "a new CSR.",
    ENDPOINT: "Check the environment's URL, and what answers there instead of D1.",
}


class Status(StrEnum):
    """How a step ended."""

    OK = "ok"
    UNCLEAR = "unclear"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step that is over.

    Attributes:
        name: Its name.
        subject: The key or the environment it was about.
        about: The same in short, which stands in the step's line.
        status: How it ended.
        detail: What was found.
        error: Why it failed.
        facts: Told to machines only.
    """

    name: str
    subject: str
    about: str
    status: Status
    detail: str = ""
    error: D1SignerError | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The step as JSON-ready values."""
        return {
            "step": self.name,
            "subject": self.subject,
            "about": self.about,
            "status": str(self.status),
            "detail": self.detail,
            "error": self.error and self.error.to_dict(),
            **self.facts,
        }


@dataclass(slots=True)
class Checklist:
    """The steps so far; each is told as it ends, since the next one may take long.

    Attributes:
        output: Where they are told.
        required: Names of steps that must pass.
        steps: Those that are over.
    """

    output: Output
    required: frozenset[str] = frozenset()
    steps: list[Step] = field(default_factory=list)
    _subject: str = ""
    _about: str = ""
    _facts: Mapping[str, str] = field(default_factory=dict)

    def begin(self, subject: str, about: str, **facts: str) -> None:
        """Turn to a key or to the environment; see `Step`."""
        self._subject = subject
        self.go_on(about, **facts)
        self._tell(printable(subject), heading=True)

    def go_on(self, about: str, **facts: str) -> None:
        """Turn to a part of it."""
        self._about, self._facts = about, facts

    def ok(self, name: str, detail: str = "", **facts: str) -> None:
        """A step has passed."""
        self._add(name, Status.OK, detail, facts=facts)

    def unclear(self, name: str, detail: str, **facts: str) -> None:
        """A step tells neither way; a later one decides."""
        if name in self.required:
            self.failed(name, _not_passed(name, detail, hint=_IF_UNCLEAR.get(name)), **facts)
        else:
            self._add(name, Status.UNCLEAR, detail, facts=facts)

    def skipped(self, name: str, reason: str, *, depends: bool = False) -> None:
        """A step was not taken.

        Args:
            name: Its name.
            reason: Why not.
            depends: Whether it is because of another that failed.
        """
        if name in self.required:
            hint = "It is taken once what failed before it is mended." if depends else None
            self.failed(name, _not_passed(name, f"not taken, since {reason}", hint=hint))
        else:
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

    def end(self) -> None:
        """No step follows; what is required and did not come up fails."""
        missing = sorted(self.required - {step.name for step in self.steps})
        for part, names in itertools.groupby(missing, _part_of):
            self.begin(part, part.lower())
            for name in names:
                self.failed(name, _not_passed(name, "no such step for what is given"))

    @property
    def failures(self) -> list[Step]:
        """The steps that failed; at the first it stopped."""
        return [step for step in self.steps if step.status is Status.FAILED]

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
            about=self._about,
            status=status,
            detail=detail,
            error=error,
            facts={**self._facts, **(facts or {})},
        )
        self.steps.append(step)
        told = ": ".join(printable(part) for part in (step.about, detail) if part)
        self._tell(f"  {step.status:<7}  {step.name:<18}  {told}".rstrip())

    def _tell(self, line: str, *, heading: bool = False) -> None:
        if not self.output.json:
            self.output.line(line, heading=heading)


def _part_of(name: str) -> str:
    """What a step is about that did not come up."""
    if name.startswith("audit-"):
        return "Audit trail"
    return "Store" if name == STORE else "Keys"


def _not_passed(name: str, reason: str, *, hint: str | None = None) -> ConfigurationError:
    """The error of a step; without a hint it says what has to be given for the step."""
    needs = f"It needs {_NEEDS.get(name, 'a key that works')}; else leave --require {name} out."
    return ConfigurationError(
        f"The step {name} is required and did not pass: {reason}.", hint=hint or needs
    )
