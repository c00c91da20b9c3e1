# SPDX-License-Identifier: Apache-2.0
"""Self-signed certificates for servers on loopback."""

from __future__ import annotations

import datetime as dt
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


def self_signed(directory: Path, *, address: str | None = "127.0.0.1") -> tuple[Path, Path]:
    """Write a certificate for ``localhost`` and an address, and its key; returns both paths."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    if address is not None:
        names.append(x509.IPAddress(ip_address(address)))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    certificate_file, key_file = directory / "server.pem", directory / "server.key"
    certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate_file, key_file


class Authority:
    """An authority that issues certificates with any dates and names into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])
        self._issued = 0
        builder = self._builder(self._name, self._key.public_key(), (-100, 100))
        builder = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        usage = x509.KeyUsage(*(False,) * 5, True, True, False, False)  # noqa: FBT003 (positional)
        self.ca_file = folder / "authority.pem"
        certificate = builder.add_extension(usage, critical=True).sign(self._key, SHA256())
        self.ca_file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(
        self, name: str, *names: x509.GeneralName, days: tuple[float, float] = (-1, 90)
    ) -> tuple[Path, Path]:
        """Write a certificate that is valid between two days from now, and its key."""
        self._issued += 1
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key.public_key(), days).add_extension(
            x509.BasicConstraints(ca=False, path_length=None), critical=True
        )
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(authority, critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate_file = self._folder / f"issued-{self._issued}.pem"
        key_file = certificate_file.with_suffix(".key")
        certificate = builder.sign(self._key, SHA256())
        certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        key_file.touch(0o600)
        key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate_file, key_file

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: tuple[float, float]
    ) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .issuer_name(self._name)
            .subject_name(subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + dt.timedelta(days[0]))
            .not_valid_after(now + dt.timedelta(days[1]))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )
