# SPDX-License-Identifier: Apache-2.0
"""A backend that takes any option, as the protocol for plug-ins allows."""

from __future__ import annotations

from typing import Any

from d1_signer.backends import pem
from d1_signer.signing.backend import Backend

given: list[dict[str, Any]] = []


def open_backend(uri: str, **options: Any) -> Backend:
    """Open the PEM file that ``open-ended:///PATH`` names."""
    given.append(options)
    return pem.open_backend(uri.replace("open-ended", "file"))
