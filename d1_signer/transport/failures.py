# SPDX-License-Identifier: Apache-2.0
"""What an error of requests, urllib3 or an SDK came from. Pure."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

from urllib3.util.ssl_match_hostname import CertificateError


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or holds, innermost last; each once."""
    seen: set[int] = set()
    todo: list[object] = [error]
    while todo:
        link = todo.pop(0)
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        todo += [link.__cause__, link.__context__, getattr(link, "reason", None), *link.args]
        # botocore keeps it as an argument of its message.
        todo.append(getattr(link, "kwargs", {}).get("error"))


def is_untrusted(error: BaseException) -> bool:
    """Whether a certificate was refused, which stays so; anything else about TLS may pass."""
    refusals = (ssl.SSLCertVerificationError, CertificateError)
    return any(isinstance(cause, refusals) for cause in causes(error))
