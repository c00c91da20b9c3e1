# SPDX-License-Identifier: Apache-2.0
"""Keys in a PEM file, for development and tests: ``file:///path/key.pem``.

The key is in this process's memory, so custody reports it as exportable; production keys belong in
an HSM or a KMS. PKCS#8 (RFC 5958), SEC 1 (RFC 5915), each plain or encrypted.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import quote

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from d1_signer.custody.evidence import Evidence, Fact
from d1_signer.errors import (
    AmbiguousKeyError,
    InvalidKeyError,
    KeyExistsError,
    KeyUriError,
    SecretSourceError,
    SignerClosedError,
    SignerError,
    SignerUnavailable,
)
from d1_signer.es256 import PublicKey
from d1_signer.secret import (
    Secret,
    SecretSource,
    is_full,
    read_private_file,
    read_secret,
    shown_path,
)
from d1_signer.signing.backend import GeneratedKey, SignatureEncoding
from d1_signer.signing.key_uri import KeyUri

_ALGORITHM = ec.ECDSA(utils.Prehashed(SHA256()))
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----")
_LONGEST_PASSPHRASE = 1023  # bytes that OpenSSL takes
_PASSPHRASE_SOURCE = "passphrase-source"  # noqa: S105 (the name of a setting)


class PemBackend:
    """A private key read from a file; see `open_backend`."""

    name = "pem"
    encoding = SignatureEncoding.DER

    def __init__(self, path: str, key: ec.EllipticCurvePrivateKey) -> None:
        """Hold a key that was read from ``path``."""
        self._path = path
        self._key: ec.EllipticCurvePrivateKey | None = key
        self._public_key = PublicKey(key.public_key())

    def public_key(self) -> PublicKey:
        """The public half of the key in the file."""
        return self._public_key

    def sign_digest(self, digest: bytes, deadline: float | None) -> bytes:  # noqa: ARG002
        """Sign a digest of 32 bytes; the answer is DER. No deadline: this takes microseconds."""
        key = self._key
        if key is None:
            raise SignerClosedError("The key file is closed.")
        return key.sign(digest, _ALGORITHM)

    def custody(self) -> Evidence:
        """Report the file's owner and permissions as they are now."""
        facts = [Fact(name="storage", value="file, and this process's memory", source="d1_signer")]
        try:
            status = Path(self._path).stat()
        except OSError as error:
            facts.append(Fact(name="file", value=error.strerror, source="operating system"))
        else:
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            facts.append(Fact(name="mode", value=mode, source="operating system"))
            facts.append(Fact(name="owner uid", value=status.st_uid, source="operating system"))
        return Evidence(
            location=f"file://{quote(self._path)}",
            exportable=True,
            generated_in_place=None,
            hardware=False,
            facts=tuple(facts),
            never_exportable=False,
        )

    def close(self) -> None:
        """Drop the key."""
        self._key = None


def open_backend(uri: str, *, passphrase_source: SecretSource | None = None) -> PemBackend:
    """Read a private key from a PEM file.

    Args:
        uri: ``file:///absolute/path.pem``, optionally ``?passphrase-source=file:PATH`` or
            ``=env:NAME``.
        passphrase_source: Where the passphrase of an encrypted key comes from; wins over the URI.

    Raises:
        KeyUriError: The URI names no absolute path.
        SecretSourceError: The file or the passphrase cannot be read, the file is open to other
            users, or the passphrase is missing, wrong or not needed.
        InvalidKeyError: Not a P-256 private key in PEM.
        AmbiguousKeyError: More than one private key in the file.
    """
    path, source = _read_uri(uri, passphrase_source)
    # Masked: frames that raise hold the whole key otherwise, for a crash reporter to send around.
    pem = Secret(read_private_file(path, what="key file").decode("ascii", "replace"))
    if "-----BEGIN" not in pem.reveal():
        raise InvalidKeyError(
            f"The key file holds no PEM: {shown_path(path)}.",
            hint="Convert it with: openssl pkcs8 -topk8 -inform DER -outform PEM.",
        )
    if len(_PRIVATE_KEY.findall(pem.reveal())) > 1:
        raise AmbiguousKeyError(
            f"The key file holds more than one private key: {shown_path(path)}.",
            hint="Give each key a file of its own.",
        )
    passphrase = (
        None if source is None else read_secret(source, what="passphrase", of=shown_path(path))
    )
    return PemBackend(path, _load(pem, passphrase, path))


def generate_key(uri: str, *, passphrase_source: SecretSource | None = None) -> GeneratedKey:
    """Make a P-256 key and write it to a new file of mode 0600, in PKCS#8.

    Args:
        uri: As for `open_backend`; the file must not exist.
        passphrase_source: Where the passphrase that encrypts the file comes from; None: plain.

    Raises:
        KeyExistsError: The file exists.
        KeyUriError: The URI names no absolute path.
        SecretSourceError: The file cannot be written, or the passphrase cannot be read or is longer
            than 1023 bytes.
        SignerUnavailable: The disk is full; no part of a key is left.
    """
    path, source = _read_uri(uri, passphrase_source)
    encryption: KeySerializationEncryption = NoEncryption()
    if source is not None:
        passphrase = read_secret(source, what="passphrase", of=shown_path(path))
        if len(passphrase.reveal().encode()) > _LONGEST_PASSPHRASE:
            raise SecretSourceError(
                f"The passphrase is longer than {_LONGEST_PASSPHRASE} bytes.",
                hint="Choose a shorter one.",
            )
        encryption = BestAvailableEncryption(passphrase.reveal().encode())
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        _write(file, path, pem)
    except FileExistsError:
        raise KeyExistsError(
            f"The key file exists: {shown_path(path)}.",
            hint="It is not overwritten; choose another path.",
        ) from None
    except OSError as error:
        raise _unwritable(path, error) from None
    return GeneratedKey(uri=uri, public_key=PublicKey(key.public_key()))


def _unwritable(path: str, error: OSError) -> SignerUnavailable | SecretSourceError:
    text = f"The key file cannot be written: {shown_path(path)}: {error.strerror}."
    if is_full(error):
        folder = shown_path(Path(path).parent)
        return SignerUnavailable(
            text, hint=f"Make room on the file system of {folder}; no part of a key is left."
        )
    return SecretSourceError(
        text,
        hint="Check that its folder is there, that this process's user may write to it, and "
        "that the disk has room; no part of a key is left.",
    )


def _write(file: int, path: str, pem: bytes) -> None:
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(pem)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        Path(path).unlink()  # a full disk must not leave half a key under the key's name
        raise


def _read_uri(uri: str, source: SecretSource | None) -> tuple[str, SecretSource | None]:
    parsed = KeyUri.parse(uri, query_names=frozenset({_PASSPHRASE_SOURCE}))
    local = parsed.authority in {"", "localhost"}
    if not local or not parsed.path.startswith("/") or "\0" in parsed.path:
        raise KeyUriError(
            "The file: URI does not name an absolute path on this machine.",
            hint="Write file:///absolute/path/key.pem.",
        )
    return parsed.path, source if source is not None else parsed.query.get(_PASSPHRASE_SOURCE)


def _load(pem: Secret, passphrase: Secret | None, path: str) -> ec.EllipticCurvePrivateKey:
    encrypted = "ENCRYPTED" in pem.reveal()
    if encrypted and passphrase is None:
        raise SecretSourceError(
            f"The key file is encrypted: {shown_path(path)}.",
            hint="Name its passphrase's source: passphrase-source=file:PATH or env:NAME.",
        )
    if not encrypted and passphrase is not None:
        raise SecretSourceError(
            f"The key file is not encrypted, and a passphrase was given: {shown_path(path)}.",
            hint="Encrypt the file, or leave the passphrase source out.",
        )
    try:
        # The passphrase itself never is a local variable of a frame that raises.
        key = load_pem_private_key(
            pem.reveal().encode(),
            None if passphrase is None else passphrase.reveal().encode(),
        )
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _unreadable(pem, path, encrypted=encrypted) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        kind = type(key).__name__.removesuffix("PrivateKey").lstrip("_")
        raise InvalidKeyError(
            f"The key file holds a key of another kind ({kind}): {shown_path(path)}.",
            hint="D1 takes ES256 only: use an EC key on P-256.",
        )
    if not isinstance(key.curve, ec.SECP256R1):
        raise InvalidKeyError(
            f"The key file's curve is {key.curve.name}: {shown_path(path)}.",
            hint="D1 takes ES256 only: use a key on P-256.",
        )
    return key


def _unreadable(pem: Secret, path: str, *, encrypted: bool) -> SignerError | SecretSourceError:
    if re.search(r"(PUBLIC KEY|CERTIFICATE)-----", pem.reveal()):
        return InvalidKeyError(
            f"The key file holds a public key or a certificate: {shown_path(path)}.",
            hint="Name the file of the private key.",
        )
    if encrypted:
        return SecretSourceError(
            f"The key file cannot be decrypted: {shown_path(path)}.",
            hint="Check the passphrase; if it is right, the file is damaged.",
        )
    return InvalidKeyError(
        f"The key file's private key cannot be read: {shown_path(path)}.",
        hint="Use PKCS#8 or SEC 1; ssh-keygen -p -m PKCS8 converts a key of OpenSSH.",
    )
