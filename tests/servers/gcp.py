# SPDX-License-Identifier: Apache-2.0
"""A Cloud KMS of the tests' own: a gRPC server on loopback that speaks google-cloud-kms' messages.

It runs as a process of its own (``python -m tests.servers.gcp``) and takes its orders, one line of
JSON each, on standard input.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from google.cloud import kms_v1 as kms
from google.cloud.kms_v1.services.key_management_service.transports import (
    KeyManagementServiceGrpcTransport,
)

RING = "projects/bank/locations/europe-west3/keyRings/d1"
KEY = f"{RING}/cryptoKeys/assertion"
VERSION = f"{KEY}/cryptoKeyVersions/10"
METADATA_TOKEN = "authorization"

_SERVICE = "/google.cloud.kms.v1.KeyManagementService/"
_Algorithm = kms.CryptoKeyVersion.CryptoKeyVersionAlgorithm
_State = kms.CryptoKeyVersion.CryptoKeyVersionState
_Format = kms.KeyOperationAttestation.AttestationFormat
_PREHASHED = ec.ECDSA(utils.Prehashed(SHA256()))

# What can be wrong with the answer to AsymmetricSign; each alters the answer.
SIGN_FAULTS: dict[str, Callable[[Any], object]] = {
    "unverified": lambda told: setattr(told, "verified_digest_crc32c", False),
    "name": lambda told: setattr(told, "name", told.name[:-1] + "1"),
    "no_name": lambda told: setattr(told, "name", ""),
    "crc": lambda told: setattr(told, "signature_crc32c", told.signature_crc32c ^ 1),
    "no_crc": lambda told: setattr(told, "signature_crc32c", None),
    "level": lambda told: setattr(told, "protection_level", kms.ProtectionLevel.SOFTWARE),
    "flipped": lambda told: setattr(told, "signature", _flip(told.signature)),
    # The same with a checksum that fits: only a verification notices.
    "truncated": lambda told: _sign_as(told, told.signature[:-7]),
    "empty": lambda told: _sign_as(told, b""),
    "tampered": lambda told: _sign_as(told, _flip(told.signature)),
}
KEY_FAULTS: dict[str, Callable[[Any], object]] = {
    "name": SIGN_FAULTS["name"],
    "crc": lambda told: setattr(told, "pem_crc32c", told.pem_crc32c ^ 1),
    "no_crc": lambda told: setattr(told, "pem_crc32c", None),
    "pem": lambda told: setattr(told, "pem", told.pem.replace("A", "B", 1)),
}
VERSION_FAULTS: dict[str, Callable[[Any], object]] = {
    "name": SIGN_FAULTS["name"],
    "protection_level": SIGN_FAULTS["level"],
}


def _flip(value: bytes) -> bytes:
    return value[:-1] + bytes((value[-1] ^ 1,))


def _sign_as(told: Any, signature: bytes) -> None:
    told.signature, told.signature_crc32c = signature, google_crc32c.value(signature)


# -- the process that serves ----------------------------------------------------------------------


class _Kms:
    def __init__(self) -> None:
        self.keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in _versions()}
        self.other = ec.generate_private_key(ec.SECP256R1())
        self.versions: dict[str, Any] = _versions()
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.released = threading.Event()
        self.random: random.Random | None = None
        self.metadata: list[str] = []
        self.tokens: list[str] = []
        self.refused_tokens: set[str] = set()

    def answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.calls[method] += 1
        metadata = {item[0]: str(item[1]) for item in context.invocation_metadata()}
        self.metadata = list(metadata)
        self.tokens.append(metadata.get(METADATA_TOKEN, "").removeprefix("Bearer "))
        if self.tokens[-1] in self.refused_tokens:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the access token has expired")
        faults = self.faults.get(method, [])
        fault = faults.pop(0) if faults else ""
        if fault == "always" and faults:
            fault = faults[0]
            faults.insert(0, "always")
        if self.random is not None and method == "AsymmetricSign":
            others = ["other_key", "other_digest", "RESOURCE_EXHAUSTED:x", "PERMISSION_DENIED:x"]
            faults = [*SIGN_FAULTS, *others]
            fault = "" if self.random.random() < 0.5 else self.random.choice(faults)
        if fault == "hold":
            self.released.wait(30)
        status, colon, text = fault.partition(":")
        if colon:
            context.abort(grpc.StatusCode[status], text)
        return getattr(self, method)(request, context, fault)

    def AsymmetricSign(self, request: Any, context: Any, fault: str) -> Any:  # noqa: N802
        digest = request.digest.sha256
        if google_crc32c.value(digest) != request.digest_crc32c:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "digest_crc32c does not match")
        version = self.version(request.name, context)
        key = self.other if fault == "other_key" else self.keys[request.name]
        signed = bytes(32) if fault == "other_digest" else digest
        signature = key.sign(signed, _PREHASHED)
        answer = kms.AsymmetricSignResponse(
            name=request.name,
            signature=signature,
            signature_crc32c=google_crc32c.value(signature),
            verified_digest_crc32c=True,
            protection_level=version.protection_level,
        )
        SIGN_FAULTS.get(fault, lambda _: None)(answer)
        return answer

    def GetPublicKey(self, request: Any, context: Any, fault: str) -> Any:  # noqa: N802
        version = self.version(request.name, context)
        key = self.keys[request.name].public_key()
        if version.algorithm == _Algorithm.EC_SIGN_P384_SHA384:
            key = ec.generate_private_key(ec.SECP384R1()).public_key()
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        answer = kms.PublicKey(
            name=request.name,
            pem=pem.decode(),
            pem_crc32c=google_crc32c.value(pem),
            algorithm=version.algorithm,
            protection_level=version.protection_level,
        )
        KEY_FAULTS.get(fault, lambda _: None)(answer)
        return answer

    def GetCryptoKeyVersion(self, request: Any, context: Any, fault: str) -> Any:  # noqa: N802
        if request.name not in self.versions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{request.name} not found.")
        version = self.versions[request.name]
        if version.state == _State.PENDING_GENERATION:
            answer = kms.CryptoKeyVersion(version)
            version.state = _State.ENABLED
            return answer
        answer = kms.CryptoKeyVersion(version)
        VERSION_FAULTS.get(fault, lambda _: None)(answer)
        return answer

    def ListCryptoKeyVersions(self, request: Any, _context: Any, _: str) -> Any:  # noqa: N802
        assert request.filter == "state=ENABLED"
        found = [v for name, v in self.versions.items() if name.startswith(f"{request.parent}/")]
        return kms.ListCryptoKeyVersionsResponse(
            crypto_key_versions=[v for v in found if v.state == _State.ENABLED]
        )

    def CreateCryptoKey(self, request: Any, context: Any, _: str) -> Any:  # noqa: N802
        name = f"{request.parent}/cryptoKeys/{request.crypto_key_id}/cryptoKeyVersions/1"
        if name in self.versions:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{name} exists.")
        template = request.crypto_key.version_template
        self.versions[name] = _version(
            name,
            algorithm=template.algorithm,
            protection_level=template.protection_level,
            state=_State.PENDING_GENERATION,
        )
        self.keys[name] = ec.generate_private_key(ec.SECP256R1())
        return kms.CryptoKey(request.crypto_key, name=name.rpartition("/cryptoKeyVersions")[0])

    def version(self, name: str, context: Any) -> Any:
        if name not in self.versions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"{name} not found.")
        version = self.versions[name]
        if version.state != _State.ENABLED:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"{name} is not enabled, current state is: {version.state.name}.",
            )
        return version

    def order(self, order: dict[str, Any]) -> object:
        if "faults" in order:
            self.released.clear()
            self.faults = order["faults"]
        if "seed" in order:
            self.random = None if order["seed"] is None else random.Random(order["seed"])
        if "state" in order:
            name, state = order["state"]
            self.versions[name].state = getattr(_State, state)
        if "refuse" in order:
            self.refused_tokens = set(order["refuse"])
        if order.get("release"):
            self.released.set()
        tokens = self.tokens[-20:]
        return {"calls": dict(self.calls), "metadata": self.metadata, "tokens": tokens}


def _version(name: str, **settings: Any) -> kms.CryptoKeyVersion:
    defaults = {
        "algorithm": _Algorithm.EC_SIGN_P256_SHA256,
        "protection_level": kms.ProtectionLevel.HSM,
        "state": _State.ENABLED,
        "attestation": kms.KeyOperationAttestation(
            format=_Format.CAVIUM_V2_COMPRESSED, content=b"signed by the HSM"
        ),
    }
    return kms.CryptoKeyVersion(name=name, **{**defaults, **settings})


def _versions() -> dict[str, Any]:
    key, level = f"{RING}/cryptoKeys", kms.ProtectionLevel
    found = [
        _version(f"{KEY}/cryptoKeyVersions/9"),
        _version(VERSION),
        _version(f"{KEY}/cryptoKeyVersions/11", state=_State.DISABLED),
        _version(f"{KEY}/cryptoKeyVersions/12", algorithm=_Algorithm.EC_SIGN_P384_SHA384),
        _version(f"{key}/p384/cryptoKeyVersions/1", algorithm=_Algorithm.EC_SIGN_P384_SHA384),
        _version(f"{key}/off/cryptoKeyVersions/1", state=_State.DISABLED),
        _version(f"{key}/gone/cryptoKeyVersions/1", state=_State.DESTROYED),
        _version(f"{key}/outside/cryptoKeyVersions/1", protection_level=level.EXTERNAL),
        _version(f"{key}/imported/cryptoKeyVersions/1", import_job=f"{RING}/importJobs/j"),
        _version(
            f"{key}/soft/cryptoKeyVersions/1",
            protection_level=level.SOFTWARE,
            attestation=kms.KeyOperationAttestation(),
        ),
    ]
    return {version.name: version for version in found}


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, server: _Kms) -> None:
        self._server = server

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = details.method.removeprefix(_SERVICE)
        request = getattr(kms, f"{method}Request", None)
        if request is None:
            return None
        return grpc.unary_unary_rpc_method_handler(
            lambda asked, context: self._server.answer(method, asked, context),
            request_deserializer=request.deserialize,
            response_serializer=lambda answer: type(answer).serialize(answer),
        )


def serve(certificate: str, key: str) -> None:
    state = _Kms()
    server = grpc.server(ThreadPoolExecutor(40), handlers=[_Handler(state)])
    plain = server.add_insecure_port("127.0.0.1:0")
    pair = [(Path(key).read_bytes(), Path(certificate).read_bytes())] if certificate else []
    credentials = grpc.ssl_server_credentials(pair) if pair else None
    tls = server.add_secure_port("127.0.0.1:0", credentials) if credentials else 0
    server.start()
    print(json.dumps({"plain": plain, "tls": tls}), flush=True)
    for line in sys.stdin:
        print(json.dumps(state.order(json.loads(line))), flush=True)
    server.stop(0)


# -- the tests' side ------------------------------------------------------------------------------


@dataclass
class Gcp:
    """A running server."""

    process: subprocess.Popen[str]
    port: int = 0
    tls_port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, **order: object) -> Any:
        with self._lock:
            assert self.process.stdin
            assert self.process.stdout
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def faults(self, **faults: list[str]) -> None:
        """Queue faults for methods; ``["always", FAULT]`` repeats one."""
        self.tell(faults=faults)

    def calls(self) -> dict[str, int]:
        told: dict[str, int] = self.tell()["calls"]
        return told

    def client(self) -> kms.KeyManagementServiceClient:
        channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        transport = KeyManagementServiceGrpcTransport(channel=channel)
        return kms.KeyManagementServiceClient(transport=transport)


@contextmanager
def cloud_kms(certificate: Path | None = None, key: Path | None = None) -> Iterator[Gcp]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.servers.gcp", str(certificate or ""), str(key or "")]
    process = subprocess.Popen(
        command,
        cwd=root,
        env={"PATH": os.environ["PATH"]},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        ports = json.loads(process.stdout.readline())
        yield Gcp(process, ports["plain"], ports["tls"])
    finally:
        process.kill()
        process.communicate()


def service_account(directory: Path) -> Path:
    """Default credentials that sign their own access token, so that no token server is asked."""
    private = rsa.generate_private_key(65537, 2048)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    file = directory / "account.json"
    account = {
        "type": "service_account",
        "project_id": "bank",
        "private_key_id": "1",
        "private_key": pem,
        "client_email": "d1@bank.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://127.0.0.1:9/token",
    }
    file.write_text(json.dumps(account))
    return file


if __name__ == "__main__":
    serve(*sys.argv[1:3])
