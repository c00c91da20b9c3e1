# SPDX-License-Identifier: Apache-2.0
"""The report on the custody of one key."""

from __future__ import annotations

import os
import platform
import pwd
import socket
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Self

from d1_signer.custody.evidence import ANSWERS, Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """Who made a report.

    Attributes:
        host: Name of the machine.
        user: The operating system's user, by name where it has one.
        d1_signer: Version of this package.
        python: Version of Python.
    """

    host: str
    user: str
    d1_signer: str
    python: str

    @classmethod
    def here(cls) -> Self:
        """This process."""
        uid = os.geteuid()
        try:
            user = pwd.getpwuid(uid).pw_name
        except KeyError:  # a container's user often has no name
            user = f"uid {uid}"
        try:
            ours = version("d1-signer")
        except PackageNotFoundError:  # run from its sources
            ours = "unknown"
        return cls(
            host=socket.gethostname(), user=user, d1_signer=ours, python=platform.python_version()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CustodyReport:
    """The evidence about one signer's key at one moment.

    Attributes:
        backend: Name of the backend, such as ``"pkcs11"``.
        kid: Key identifier.
        thumbprint: RFC 7638 thumbprint of the public key.
        collected_at: Seconds since the epoch.
        evidence: What is known.
        plug_in: Distribution, version and class of a backend that is not built in; else None.
        made_by: Who made the report; None where nobody says.
    """

    backend: str
    kid: str
    thumbprint: str
    collected_at: int
    evidence: Evidence
    plug_in: str | None = None
    made_by: Maker | None = None

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        evidence = self.evidence
        return {
            "backend": self.backend,
            "plug_in": self.plug_in,
            "kid": self.kid,
            "thumbprint": self.thumbprint,
            "collected_at": self.collected_at,
            "time": utc(self.collected_at),
            "made_by": None if self.made_by is None else asdict(self.made_by),
            "location": evidence.location,
            **{name: getattr(evidence, name) for name in ANSWERS},
            "attested": [name for name in ANSWERS if evidence.attested_by(name) is not None],
            "facts": [
                {**asdict(fact), "assurance": str(fact.assurance)} for fact in evidence.facts
            ],
            "limits": [
                limit for one in evidence.attestations or () for limit in one.verified.limits
            ],
        }


def utc(seconds: int) -> str:
    """Seconds since the epoch as RFC 3339 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
