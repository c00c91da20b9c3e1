# SPDX-License-Identifier: Apache-2.0
"""A token whose calls are counted outside of Python; see tests/pkcs11."""

from __future__ import annotations

from tests.pkcs11.conftest import prepared_token, shim, shim_path, token

__all__ = ["prepared_token", "shim", "shim_path", "token"]
