# SPDX-License-Identifier: Apache-2.0
"""Holding one key's custody against its policy: when it is opened, and when it is opened anew."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from d1_signer.attestation import Statement
from d1_signer.custody.evidence import ANSWERS, Evidence
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.custody.statements import (
    attested,
    read_anchor_file,
    read_statement,
    with_attested,
)
from d1_signer.errors import ConfigurationError, CustodyError, SignerError
from d1_signer.es256 import PublicKey
from d1_signer.events import Recordable, Trail
from d1_signer.logfmt import told
from d1_signer.signing.backend import Backend, Reopening, guarded
from d1_signer.signing.recording import answers

_log = logging.getLogger(__name__)


class Holding:
    """What is known of one key's custody, and what is demanded of it."""

    def __init__(
        self,
        backend: Backend,
        public_key: PublicKey,
        *,
        policy: CustodyPolicy | None,
        attestation: Statement | str | None,
        anchors: str | None,
        trail: Trail | None,
        about: Mapping[str, Recordable],
    ) -> None:
        """Verify the statement that is given, if one is.

        Args:
            backend: Holds the key.
            public_key: The key.
            policy: What is demanded; None: what ``D1_CUSTODY_POLICY`` says.
            attestation: A statement, or where it is read from.
            anchors: Path of a file of anchors.
            trail: Records each decision.
            about: The key and its backend, as records and the log name them.

        Raises:
            ConfigurationError: A policy, a statement or a file that is none.
            AttestationError: The statement does not prove anything about this key.
        """
        if not isinstance(policy, CustodyPolicy | None):
            raise ConfigurationError("custody_policy is not a CustodyPolicy.")
        self._trail = trail
        self._about = about
        self._backend = backend
        self._name = str(about["backend"])
        self._public_key = public_key
        self._policy = CustodyPolicy.from_environment() if policy is None else policy
        self._anchors = read_anchor_file(anchors)
        self._given = (
            []
            if attestation is None
            else [attested(read_statement(attestation), public_key, self._anchors)]
        )
        demands = bool(self._policy and self._policy.words)
        reopens = demands and guarded(self._name, isinstance, backend, Reopening)
        # What `hold_again` looks at for each signature; None where there is nothing to look at.
        self.watched: Reopening | None = backend if reopens else None  # type: ignore[assignment]
        self._held = -1

    def evidence(self, deadline: float | None = None) -> Evidence:
        """What the backend claims, with what can be verified.

        Args:
            deadline: Moment on ``time.monotonic()``, for a backend that can be told.

        Raises:
            SignerError: The backend cannot tell.
        """
        backend = self._backend
        if deadline is not None and isinstance(backend, Reopening):
            evidence = guarded(self._name, backend.custody_within, deadline)
        else:
            evidence = guarded(self._name, backend.custody)
        statements = evidence.statements or () if isinstance(evidence, Evidence) else (None,)
        if not all(isinstance(one, Statement) for one in statements):
            raise SignerError(
                f"The {self._name} backend gave no evidence.",
                hint="This is a defect of the backend; report it to its maintainers.",
            )
        return with_attested(evidence, self._public_key, self._given, self._anchors)

    def hold(self) -> None:
        """Hold the key against the policy, and tell the log once what is demanded and what is.

        Raises:
            AuditUnavailable: The decision cannot be recorded.
            CustodyError: It is not met.
            SignerError: The backend cannot tell.
        """
        if self._policy is None or not self._policy.words:
            return
        opened = self._openings()
        evidence = self.evidence()
        self._decide(self._policy, evidence)
        self._held = opened
        _log.info(
            "custody.policy %s %s",
            told(
                {
                    "backend": self._name,
                    "kid": self._about["kid"],
                    "policy": ",".join(self._policy.words),
                }
            ),
            " ".join(f"{name}={_told(evidence, name)}" for name in ANSWERS),
        )

    def hold_again(self, deadline: float | None) -> None:
        """Hold it again where the backend has opened the key anew since.

        Raises:
            AuditUnavailable: The decision cannot be recorded.
            CustodyError: It is not met any more.
            SignerError: The backend cannot tell.
        """
        watched, policy = self.watched, self._policy
        if watched is None or policy is None or self._openings() == self._held:
            return
        opened = self._openings()
        self._decide(policy, self.evidence(deadline))
        self._held = opened

    def _openings(self) -> int:
        watched = self.watched  # a plug-in's code may answer it
        return 0 if watched is None else guarded(self._name, lambda: watched.openings)

    def _decide(self, policy: CustodyPolicy, evidence: Evidence) -> None:
        outcome = CustodyError.code
        try:
            policy.check(evidence)
            outcome = "met"
        finally:
            if self._trail is not None:
                decision = {"demands": list(policy.words), "outcome": outcome}
                self._trail.note("policy", {**self._about, **answers(evidence), **decision})


def _told(evidence: Evidence, name: str) -> str:
    answer = getattr(evidence, name)
    if answer is None:
        return "unknown"
    by = "claimed" if evidence.attested_by(name) is None else "attested"
    return f"{'yes' if answer else 'no'}({by})"
