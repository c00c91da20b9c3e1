# SPDX-License-Identifier: Apache-2.0
"""Keys that the ``openssl`` command signs with: ``openssl:///path/key.pem``."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from d1_signer import (
    Evidence,
    Fact,
    GeneratedKey,
    InvalidKeyError,
    KeyExistsError,
    KeyNotFoundError,
    KeyUri,
    KeyUriError,
    PublicKey,
    SignatureEncoding,
    SignerClosedError,
    SignerTimeout,
    SignerUnavailable,
)

_TIME_LIMIT = 10.0  # seconds, where the caller gives no deadline


class OpensslBackend:
    """A key in a file, used through ``openssl pkeyutl``."""

    name = "openssl"
    encoding = SignatureEncoding.DER  # what pkeyutl answers: declared here, never guessed

    def __init__(self, path: str) -> None:
        """Read the public key, once: from now on it is pinned."""
        self._path = path
        self._closed = False
        pem = _openssl(["pkey", "-in", path, "-pubout"], b"", None)
        self._public_key = PublicKey.from_pem(pem)

    def public_key(self) -> PublicKey:
        """The public key as it was at opening."""
        return self._public_key

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:
        """Sign 32 bytes; a process for each call, so threads and forks need no care here."""
        if self._closed:
            raise SignerClosedError("The key is closed.")
        return _openssl(["pkeyutl", "-sign", "-inkey", self._path], digest, deadline)

    def custody(self) -> Evidence:
        """A file can be copied; who made the key, it does not say."""
        return Evidence(
            location=f"openssl://{self._path}",
            exportable=True,
            generated_in_place=None,
            hardware=False,
            facts=(Fact(name="storage", value="file", source="d1_signer_openssl"),),
        )

    def close(self) -> None:
        """Nothing is held."""
        self._closed = True


def open_backend(uri: str) -> OpensslBackend:
    """Open the key that ``openssl:///path/key.pem`` names.

    Raises:
        KeyUriError: The URI names no absolute path.
        KeyNotFoundError: There is no such file.
        InvalidKeyError: ``openssl`` cannot read it, or it is not on P-256.
    """
    path = _path(uri)
    if not Path(path).exists():
        raise KeyNotFoundError(f"There is no key file {path}.")
    return OpensslBackend(path)


def generate_key(uri: str) -> GeneratedKey:
    """Make a key in a new file.

    Raises:
        KeyExistsError: The file exists.
    """
    path = _path(uri)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise KeyExistsError(f"The key file {path} exists.") from None
    options = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path]
    _openssl(["genpkey", *options], b"", None)
    return GeneratedKey(uri=uri, public_key=OpensslBackend(path).public_key())


def _path(uri: str) -> str:
    parsed = KeyUri.parse(uri)
    if parsed.authority or not parsed.path.startswith("/"):
        raise KeyUriError("The openssl: URI names no path.", hint="Write openssl:///path/key.pem.")
    return parsed.path


def _openssl(arguments: list[str], data: bytes, deadline: float | None) -> bytes:
    limit = _TIME_LIMIT if deadline is None else deadline - time.monotonic()
    try:
        ran = subprocess.run(
            ["openssl", *arguments], input=data, capture_output=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        # `from None`: what it carries (arguments, input, output) is nobody's business.
        raise SignerTimeout("openssl did not answer in time.") from None
    except OSError:
        raise SignerUnavailable(
            "The openssl command cannot be run.", hint="Install it.", retryable=False
        ) from None
    if ran.returncode != 0:
        raise InvalidKeyError(
            f"openssl {arguments[0]} failed with status {ran.returncode}.",
            hint="Check that the file holds an EC key on P-256 without a passphrase.",
        )
    return ran.stdout
