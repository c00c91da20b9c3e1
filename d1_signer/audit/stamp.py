# SPDX-License-Identifier: Apache-2.0
"""Time-stamps of RFC 3161: what is asked of an authority, and whether its answer holds."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from asn1crypto import cms, core, tsp
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID

from d1_signer.errors import AuditError

_GRANTED = frozenset({"granted", "granted_with_mods"})
_HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}

_NOT_AS_TYPED = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError),
    *(UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension),
    x509.UnsupportedGeneralNameType,
)


class _Response(core.Sequence):  # type: ignore[misc]
    # That of asn1crypto does not know that a refusal has no token.
    _fields = [  # noqa: RUF012 (asn1crypto's way)
        ("status", tsp.PKIStatusInfo),
        ("time_stamp_token", cms.ContentInfo, {"optional": True}),
    ]


class Stamp(NamedTuple):
    """What an authority says.

    Attributes:
        time: When it saw what is stamped.
        authority: Subject of its certificate.
        serial: Number of the stamp, which the authority gives once.
    """

    time: datetime
    authority: str
    serial: int


def request(content: bytes, nonce: int) -> bytes:
    """A request for a stamp over content, of which the authority sees the SHA-256 hash alone."""
    algorithm = {"algorithm": "sha256"}
    imprint = {"hash_algorithm": algorithm, "hashed_message": hashlib.sha256(content).digest()}
    return bytes(
        tsp.TimeStampReq(
            {"version": "v1", "message_imprint": imprint, "nonce": nonce, "cert_req": True}
        ).dump()
    )


def verify(
    response: bytes, content: bytes, authorities: bytes, *, nonce: int | None = None
) -> Stamp:
    """Verify a response.

    Args:
        response: The bytes of a TimeStampResp.
        content: What is stamped.
        authorities: PEM certificates of those that may issue the authority's certificate.
        nonce: That of the request; None where it is not known any more.

    Raises:
        AuditError: It is no stamp over that content, or of nobody that these authorities know.
    """
    # What fails is left behind with its frames: objects of asn1crypto that were read half have no
    # repr, which would break whoever reports the error with its variables.
    try:
        return _verified(_token(response), content, authorities, nonce)
    except AuditError as error:
        failure = error.with_traceback(None)
    except _NOT_AS_TYPED:
        # What asn1crypto and cryptography raise for what is not as its type says.
        failure = _no_stamp("it is no response of RFC 3161, or has what is not supported")
    failure.__context__ = None
    raise failure


def _token(response: bytes) -> Any:
    told = _Response.load(response, strict=True)
    status = told["status"]["status"].native
    if status not in _GRANTED:
        texts = told["status"]["status_string"].native or []
        said = "; ".join([status, *map(str, texts)])[:400]
        raise AuditError(
            f"The time-stamp authority refused: {said if said.isprintable() else status}.",
            hint="Look at which requests it takes: a policy or an account may be missing.",
        )
    token = told["time_stamp_token"]
    if token["content_type"].native != "signed_data":
        raise _no_stamp("it holds no signed data")
    return token["content"]


def _verified(signed: Any, content: bytes, authorities: bytes, nonce: int | None) -> Stamp:
    wrapped = signed["encap_content_info"]
    if wrapped["content_type"].native != "tst_info" or len(signed["signer_infos"]) != 1:
        raise _no_stamp("it is not signed once over a TSTInfo")
    encoded = bytes(wrapped["content"].contents)
    info = tsp.TSTInfo.load(encoded, strict=True)
    imprint = info["message_imprint"]
    hashed = imprint["hashed_message"].native
    if imprint["hash_algorithm"]["algorithm"].native != "sha256" or not hmac.compare_digest(
        hashed, hashlib.sha256(content).digest()
    ):
        raise AuditError("The time-stamp is over something else: its hash does not fit.")
    if nonce is not None and info["nonce"].native != nonce:
        raise AuditError("The time-stamp answers another request: its nonce does not fit.")
    signer = signed["signer_infos"][0]
    certificates = [
        choice.chosen for choice in signed["certificates"] if choice.name == "certificate"
    ]
    own = next((found for found in certificates if _is_signer(found, signer["sid"])), None)
    if own is None:
        raise _no_stamp("the authority's certificate is not in it")
    _require_attributes(signer, encoded, own.dump())
    moment = info["gen_time"].native.astimezone(UTC)
    certificate = x509.load_der_x509_certificate(own.dump())
    others = [x509.load_der_x509_certificate(found.dump()) for found in certificates]
    _require_chain(certificate, others, authorities, moment)
    _require_signature(signer, certificate)
    return Stamp(moment, certificate.subject.rfc4514_string(), info["serial_number"].native)


def _is_signer(certificate: Any, sid: Any) -> bool:
    if sid.name != "issuer_and_serial_number":
        return bool(certificate.key_identifier == sid.chosen.native)
    told = sid.chosen
    return bool(
        certificate.serial_number == told["serial_number"].native
        and certificate.issuer == told["issuer"]
    )


def _require_attributes(signer: Any, encoded: bytes, certificate: bytes) -> None:
    """The signed attributes must tell the content and the signer's certificate (RFC 5816)."""
    attributes = {found["type"].native: found["values"][0] for found in signer["signed_attrs"]}
    algorithm = _hash(signer["digest_algorithm"])
    digest = hashlib.new(algorithm.name, encoded).digest()
    if (
        attributes["content_type"].native != "tst_info"
        or attributes["message_digest"].native != digest
    ):
        raise AuditError("The time-stamp's content is not what was signed.")
    if (v2 := attributes.get("signing_certificate_v2")) is not None:
        told = v2["certs"][0]
        name, fingerprint = told["hash_algorithm"]["algorithm"].native, told["cert_hash"].native
    else:
        name, fingerprint = (
            "sha1",
            attributes["signing_certificate"]["certs"][0]["cert_hash"].native,
        )
    if hashlib.new(name, certificate).digest() != fingerprint:
        raise AuditError("The time-stamp names another certificate than the one it comes with.")


def _require_chain(
    certificate: x509.Certificate,
    others: Sequence[x509.Certificate],
    authorities: bytes,
    moment: datetime,
) -> None:
    present = verification.Criticality
    ends = verification.ExtensionPolicy.permit_all().require_present(
        x509.ExtendedKeyUsage, present.CRITICAL, _for_stamps_alone
    )
    issuers = (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.BasicConstraints, present.AGNOSTIC, _is_authority)
        .may_be_present(x509.KeyUsage, present.AGNOSTIC, _signs_certificates)
        .may_be_present(x509.ExtendedKeyUsage, present.AGNOSTIC, _allows_stamps)
    )
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(x509.load_pem_x509_certificates(authorities)))
        .time(moment)
        .extension_policies(ca_policy=issuers, ee_policy=ends)
        .build_client_verifier()
    )
    try:
        verifier.verify(certificate, [other for other in others if other != certificate])
    except verification.VerificationError as error:
        said = str(error)[:300]
        raise AuditError(
            "The time-stamp authority's certificate is not trusted"
            f"{': ' + said if said.isprintable() else ''}.",
            hint="It needs a chain to the given authorities, valid at the time that it tells, and "
            "the extended key usage timeStamping alone, critical (RFC 3161 section 2.3).",
        ) from None


def _for_stamps_alone(_policy: object, _of: object, usage: x509.ExtendedKeyUsage) -> None:
    if [*usage] != [ExtendedKeyUsageOID.TIME_STAMPING]:
        msg = "its extended key usage is not timeStamping alone"
        raise ValueError(msg)


def _is_authority(_policy: object, _of: object, constraints: x509.BasicConstraints) -> None:
    if not constraints.ca:
        msg = "an issuer is no authority"
        raise ValueError(msg)


def _signs_certificates(_policy: object, _of: object, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        msg = "an issuer may not sign certificates"
        raise ValueError(msg)


def _allows_stamps(_policy: object, _of: object, usage: x509.ExtendedKeyUsage | None) -> None:
    allowed = {ExtendedKeyUsageOID.TIME_STAMPING, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
    if usage is not None and not allowed & {*usage}:
        msg = "an issuer's extended key usage does not allow time-stamps"
        raise ValueError(msg)


def _require_signature(signer: Any, certificate: x509.Certificate) -> None:
    # RFC 5652 section 5.4: signed as a SET, whatever tag stands there.
    attributes = cms.CMSAttributes.load(b"\x31" + signer["signed_attrs"].dump()[1:]).dump()
    algorithm = signer["signature_algorithm"]
    name = algorithm["algorithm"].native
    hashed = _hash(signer["digest_algorithm"])
    key, value = certificate.public_key(), signer["signature"].native
    try:
        if isinstance(key, rsa.RSAPublicKey) and name in {"rsassa_pkcs1v15", f"{hashed.name}_rsa"}:
            key.verify(value, attributes, padding.PKCS1v15(), hashed)
        elif isinstance(key, ec.EllipticCurvePublicKey) and name == f"{hashed.name}_ecdsa":
            key.verify(value, attributes, ec.ECDSA(hashed))
        else:
            raise _no_stamp("its signature is neither RSA (PKCS #1 v1.5) nor ECDSA")
    except InvalidSignature:
        raise AuditError("The signature of the time-stamp is false.") from None


def _hash(algorithm: Any) -> hashes.HashAlgorithm:
    name = algorithm["algorithm"].native
    if name not in _HASHES:
        raise _no_stamp("it is signed with another hash than SHA-256, SHA-384 or SHA-512")
    return _HASHES[name]()


def _no_stamp(reason: str) -> AuditError:
    return AuditError(f"The time-stamp cannot be verified: {reason}.")
