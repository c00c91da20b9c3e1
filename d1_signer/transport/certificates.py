# SPDX-License-Identifier: Apache-2.0
"""Whether a certificate is valid now, by this machine's clock, which may be wrong. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509


def dates_at_fault(certificate: x509.Certificate) -> str | None:
    """What is wrong with the dates of a certificate now, as words about it; None where nothing."""
    now = datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        return f"expired on {_shown(end)}"
    if now < begin:
        return f"is not valid before {_shown(begin)}"
    return None


def _shown(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
