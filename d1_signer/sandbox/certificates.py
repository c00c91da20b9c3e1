# SPDX-License-Identifier: Apache-2.0
"""Certificates for mutual TLS on loopback, made for one run and removed after it.

The extensions are those of RFC 5280 section 4.2, so that strict verifiers accept them: Python 3.13
and newer set ``VERIFY_X509_STRICT``, which insists on the key identifiers.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import shutil
import ssl
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from d1_signer.errors import InvalidInputError, InvalidKeyError

if TYPE_CHECKING:
    from collections.abc import Sequence

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_LOOPBACK_NAMES: tuple[x509.GeneralName, ...] = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)
_LONGEST_PASSPHRASE = 1023  # bytes that OpenSSL takes
_BACKDATED = dt.timedelta(hours=1)
_LIFETIME = dt.timedelta(days=90)


class CertificateAuthority:
    """An authority whose key exists in this process only."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name("d1-signer sandbox authority")
        builder = _builder(name, name, self._key.public_key())
        self.certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def issue(
        self,
        key: PublicKey,
        common_name: str,
        usage: x509.ObjectIdentifier,
        names: Sequence[x509.GeneralName] = (),
    ) -> x509.Certificate:
        """Issue an end-entity certificate for `key` and one extended key usage."""
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _builder(self.certificate.subject, _name(common_name), key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority, critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


class CertificateFolder:
    """A private folder with the authority, a server and a client certificate.

    Attributes:
        path: The folder, mode 0700.
        ca_file: The authority's certificate, PEM.
        client_certificate: The client's certificate, PEM.
        client_key: The client's P-256 key, unencrypted PKCS#8 PEM, mode 0600.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="d1-signer-sandbox-"))
        self._remove = weakref.finalize(self, _remove_folder, self.path, os.getpid())
        self._authority = CertificateAuthority()
        self._issued = 0
        self.ca_file = self._write("ca.pem", _certificate_pem(self._authority.certificate))
        self._server_certificate, self._server_key = self._issue_server()
        self.client_certificate, self.client_key = self.issue_client()

    def issue_client(
        self, *, key: Literal["ec", "rsa"] = "ec", passphrase: bytes | None = None
    ) -> tuple[Path, Path]:
        """Issue a client certificate for a new key (P-256 or RSA 2048).

        Args:
            key: Kind of key.
            passphrase: Encrypts the PKCS#8 file where given.

        Returns:
            The PEM files of the certificate and of the key.

        Raises:
            InvalidInputError: Another kind of key, or a passphrase that cannot be one.
        """
        if key not in ("ec", "rsa"):
            raise InvalidInputError("A client key is either 'ec' or 'rsa'.")
        if passphrase is not None and not (
            isinstance(passphrase, bytes) and 0 < len(passphrase) <= _LONGEST_PASSPHRASE
        ):
            raise InvalidInputError("A passphrase is 1 to 1023 bytes.")
        private: PrivateKey = (
            rsa.generate_private_key(public_exponent=65537, key_size=2048)
            if key == "rsa"
            else ec.generate_private_key(ec.SECP256R1())
        )
        certificate = self._authority.issue(
            private.public_key(), "d1-signer sandbox client", ExtendedKeyUsageOID.CLIENT_AUTH
        )
        return self._write_pair(self._stem(), certificate, private, passphrase)

    def sign_request(self, request: bytes) -> Path:
        """Issue a client certificate for the key of a CSR in PEM; returns its PEM file.

        Raises:
            InvalidInputError: Not a CSR, or not signed by its key.
            InvalidKeyError: The key is neither RSA nor EC.
        """
        try:
            csr = x509.load_pem_x509_csr(request)
            key = csr.public_key() if csr.is_signature_valid else None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if key is None:
            raise InvalidInputError("Not a certificate signing request in PEM that its key signed.")
        if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            raise InvalidKeyError("A client key is an EC or an RSA key.")
        certificate = self._authority.issue(
            key, "d1-signer sandbox client", ExtendedKeyUsageOID.CLIENT_AUTH
        )
        return self._write(f"{self._stem()}.pem", _certificate_pem(certificate))

    def _stem(self) -> str:
        self._issued += 1
        return "client" if self._issued == 1 else f"client-{self._issued}"

    def server_context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer that accepts only clients with a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cafile=self.ca_file)
        context.load_cert_chain(self._server_certificate, self._server_key)
        return context

    def remove(self) -> None:
        """Remove the folder and all keys in it; more than once does no harm."""
        self._remove()

    def _issue_server(self) -> tuple[Path, Path]:
        private = ec.generate_private_key(ec.SECP256R1())
        certificate = self._authority.issue(
            private.public_key(),
            "d1-signer sandbox server",
            ExtendedKeyUsageOID.SERVER_AUTH,
            names=_LOOPBACK_NAMES,
        )
        return self._write_pair("server", certificate, private, None)

    def _write_pair(
        self,
        stem: str,
        certificate: x509.Certificate,
        private: PrivateKey,
        passphrase: bytes | None,
    ) -> tuple[Path, Path]:
        encryption: serialization.KeySerializationEncryption = (
            serialization.NoEncryption()
            if passphrase is None
            else serialization.BestAvailableEncryption(passphrase)
        )
        pem = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
        return (
            self._write(f"{stem}.pem", _certificate_pem(certificate)),
            self._write(f"{stem}.key", pem),
        )

    def _write(self, name: str, content: bytes) -> Path:
        path = self.path / name
        # The mode is given at creation: a later chmod would leave a moment for other readers.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
        return path


def _remove_folder(path: Path, owner: int) -> None:
    # A forked child runs the same finalizer at its exit; the folder is its parent's.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
