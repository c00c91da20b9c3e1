# SPDX-License-Identifier: Apache-2.0
"""Connections are tried through what users have: a fetcher against the sandbox."""

from __future__ import annotations

from tests.token.conftest import fetcher, make_fetcher, pem_uri, sandbox, signer

__all__ = ["fetcher", "make_fetcher", "pem_uri", "sandbox", "signer"]
