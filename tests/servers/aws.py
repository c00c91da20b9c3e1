# SPDX-License-Identifier: Apache-2.0
"""An AWS KMS endpoint on loopback (ministack), and the ways in which its answers go wrong."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

from tests.leaks.known import known
from tests.servers.fault_proxy import Answer, Dropped, Fault, FaultProxy, Forward, Request
from tests.servers.process import accepts, free_port, running

if TYPE_CHECKING:
    from mypy_boto3_kms import KMSClient

REGION = "eu-central-1"
ACCESS_KEY = "AKIATESTTESTTEST"
SECRET_KEY = known("secret-access-key-of-the-tests")
SESSION_TOKEN = known("session-token-of-the-tests")
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_SESSION_TOKEN": SESSION_TOKEN,
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@dataclass(frozen=True)
class Aws:
    """A running endpoint."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> KMSClient:
        """A client of the tests' own, for what an operator does."""
        session = boto3.Session(
            aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY, region_name=REGION
        )
        config = Config(max_pool_connections=64)
        client: KMSClient = session.client("kms", endpoint_url=self.url, config=config)
        return client

    def make_key(self, **settings: Any) -> str:
        """Make a key and return its ARN."""
        client = self.client()
        arguments = {"KeySpec": "ECC_NIST_P256", "KeyUsage": "SIGN_VERIFY", **settings}
        arn: str = client.create_key(**arguments)["KeyMetadata"]["Arn"]
        client.close()
        return arn

    @contextmanager
    def proxy(self) -> Iterator[FaultProxy]:
        with FaultProxy(("127.0.0.1", self.port)) as proxy:
            yield proxy


@contextmanager
def aws_kms(directory: Path) -> Iterator[Aws]:
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "kms,sts",
        # Both would listen on all addresses.
        "IOT_MTLS_ENABLED": "0",
        "SFTP_ENABLED": "0",
    }
    command = [str(Path(sys.executable).parent / "ministack")]
    log = directory / "ministack.log"
    with running(command, env=environment, log=log, ready=lambda: accepts(port)):
        yield Aws(port)


def calls(proxy: FaultProxy) -> list[str]:
    """The operations that were asked for, in order."""
    return [operation(request) for request in proxy.requests]


def operation(request: Request) -> str:
    return request.headers.get("X-Amz-Target", "").removeprefix("TrentService.")


def on_sign(fault: Fault) -> Fault:
    """Let ``fault`` see the requests to sign only."""

    def seen(request: Request, forward: Forward) -> Answer:
        return fault(request, forward) if operation(request) == "Sign" else forward(request)

    return seen


def refusal(status: int, code: str, message: str = "no") -> Fault:
    body = json.dumps({"__type": code, "message": message}).encode()
    headers = {"Content-Type": "application/x-amz-json-1.1", "x-amzn-RequestId": "request-17"}
    return lambda _request, _forward: Answer(status, headers, body)


def page(status: int, body: bytes) -> Fault:
    return lambda _request, _forward: Answer(status, {"Content-Type": "text/html"}, body)


def dropped(_request: Request, _forward: Forward) -> Answer:
    raise Dropped


def cut_short(request: Request, forward: Forward) -> Answer:
    answer = forward(request)
    return replace(answer, sent=len(answer.body) // 2)


def held(until: threading.Event) -> Fault:
    def hold(request: Request, forward: Forward) -> Answer:
        until.wait(30)
        return forward(request)

    return hold


def asking(**other: str) -> Fault:
    """The request is altered on its way; the answer still names the key that was asked for."""

    def alter(request: Request, forward: Forward) -> Answer:
        asked = json.loads(request.body)
        answer = forward(replace(request, body=json.dumps({**asked, **other}).encode()))
        told = json.loads(answer.body)
        told["KeyId"] = json.loads(forward_description(request, forward).body)["KeyMetadata"]["Arn"]
        return replace(answer, body=json.dumps(told).encode())

    return alter


def forward_description(request: Request, forward: Forward) -> Answer:
    headers = {**request.headers, "X-Amz-Target": "TrentService.DescribeKey"}
    body = json.dumps({"KeyId": json.loads(request.body)["KeyId"]}).encode()
    return forward(replace(request, headers=headers, body=body))


def answering(change: Callable[[dict[str, Any]], object]) -> Fault:
    """The answer's JSON is altered on its way back."""

    def alter(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        told = json.loads(answer.body)
        change(told)
        return replace(answer, body=json.dumps(told).encode())

    return alter


def with_signature(change: Callable[[bytes], bytes]) -> Fault:
    """The signature is altered on its way back."""

    def alter(told: dict[str, Any]) -> None:
        if "Signature" in told:
            changed = change(base64.b64decode(told["Signature"]))
            told["Signature"] = base64.b64encode(changed).decode()

    return answering(alter)
