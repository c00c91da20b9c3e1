# SPDX-License-Identifier: Apache-2.0
"""A file of settings for the sandbox, which a test changes as an operator does."""

from __future__ import annotations

from pathlib import Path

from d1_signer import generate_key, open_signer
from d1_signer.sandbox import Sandbox
from tests.token.conftest import ISSUER


class SettingsFile:
    """The file, and what it names."""

    def __init__(self, folder: Path, sandbox: Sandbox) -> None:
        self.path = folder / "d1.toml"
        self.sandbox = sandbox
        self._folder = folder
        self.lines = {
            "environment": f'"{sandbox.base_url}"',
            "issuer_id": f'"{ISSUER}"',
            "ca_file": f'"{sandbox.ca_file}"',
        }
        self.tables = self.store = ""
        self.certificate(sandbox.client_certificate, sandbox.client_key)

    def key(self, kid: str) -> str:
        """The URI of a key, which is made, and known to the sandbox, where it is new."""
        uri = (self._folder / f"{kid}.pem").as_uri()
        if not (self._folder / f"{kid}.pem").exists():
            generate_key(uri)
            with open_signer(uri, kid=kid) as signer:
                self.sandbox.register_key(kid, signer.public_key.jwk())
        return f"{uri}#{kid}"

    def keys(self, *kids: str) -> None:
        self.lines["key"] = "[" + ", ".join(f'"{self.key(kid)}"' for kid in kids) + "]"

    def certificate(self, certificate: Path, key: Path) -> None:
        self.lines |= {"client_cert": f'"{certificate}"', "client_key": f'"{key}"'}

    def text(self) -> str:
        return "".join(f"{name} = {value}\n" for name, value in self.lines.items()) + self.tables

    def write(self, text: str | None = None) -> None:
        """Put a whole file in the place of the one that is there."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(self.text() if text is None else text)
        fresh.replace(self.path)
