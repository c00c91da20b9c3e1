# SPDX-License-Identifier: Apache-2.0
"""A signer, a D1 in a process of its own, and fetchers between them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests

from d1_signer import ClientCertificate, Signer, SignEvent, TokenFetcher, generate_key, open_signer
from d1_signer.events import Event
from d1_signer.sandbox import Sandbox
from d1_signer.token.assertion import sign_assertion
from d1_signer.token.d1 import AssertionProfile

ISSUER, KID = "bench", "bench-key"


class D1:
    """The sandbox in another process, so that it shares no interpreter lock with the callers."""

    def __init__(self, signer: Signer) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.token_setting"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.settings = self.tell("register", KID, signer.public_key.jwk())

    def tell(self, name: str, *arguments: Any, **options: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments, options]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def requests(self) -> int:
        return int(self.tell("count"))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    with Sandbox(issuer_id=ISSUER) as sandbox:
        certificate = (str(sandbox.client_certificate), str(sandbox.client_key))
        for line in sys.stdin:
            name, arguments, options = json.loads(line)
            answer: object = None
            if name == "register":
                sandbox.register_key(*arguments)
                answer = [sandbox.base_url, str(sandbox.ca_file), *certificate]
            elif name == "count":
                answer = sandbox.counters.token_requests
            elif name == "misbehave":
                sandbox.misbehave(*arguments, **options)
            elif name == "life":
                sandbox.set_token_lifetime(*arguments)
            print(json.dumps(answer), flush=True)


class Bench:
    """A signer, a D1, and fetchers between them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.key_file = folder / "key.pem"
        self.signed: list[float] = []
        uri = generate_key(self.key_file.as_uri()).uri
        self.signer = stack.enter_context(open_signer(uri, kid=KID, observers=[self._note]))
        self.d1 = D1(self.signer)
        stack.callback(self.d1.close)

    def _note(self, event: Event) -> None:
        if isinstance(event, SignEvent):
            self.signed.append(event.duration)

    def fetcher(self, **options: Any) -> TokenFetcher:
        url, ca_file, certificate, key = self.d1.settings
        settings = {"retry_interval": 0.01} | options
        return self._stack.enter_context(
            TokenFetcher(
                self.signer,
                issuer_id=ISSUER,
                environment=url,
                client_certificate=ClientCertificate(certificate, key),
                ca_file=ca_file,
                **settings,
            )
        )

    def assertions(self, number: int) -> list[str]:
        profile = AssertionProfile(
            issuer_id=ISSUER, audience=f"{self.d1.settings[0]}/oauth2/token", lifetime=300
        )
        return [sign_assertion(self.signer, profile).reveal() for _ in range(number)]

    def session(self) -> requests.Session:
        _, ca_file, certificate, key = self.d1.settings
        session = requests.Session()
        session.trust_env, session.verify, session.cert = False, ca_file, (certificate, key)
        return session


@contextmanager
def benched() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


if __name__ == "__main__":
    serve()
