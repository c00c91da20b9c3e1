# SPDX-License-Identifier: Apache-2.0
"""How D1 is reached: certificate, authorities, proxy, and what comes of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from d1_signer.cli._callbacks import checked_path, checked_path_or_key, checked_proxy
from d1_signer.cli._config import settings_in
from d1_signer.cli._options import BackendOptions
from d1_signer.cli._output import Command, setting
from d1_signer.cli._paths import FILE
from d1_signer.cli._settings import Issuer, open_key
from d1_signer.cli._trail import current_trail
from d1_signer.errors import ConfigurationError
from d1_signer.secret import SecretSource, read_secret
from d1_signer.signing.key_uri import KeyUri, scheme_of

if TYPE_CHECKING:
    from d1_signer.signing.signer import Signer
    from d1_signer.signing.signer_set import SignerSet
    from d1_signer.token.d1 import Environment
    from d1_signer.token.fetcher import TokenFetcher
    from d1_signer.transport.client import ClientTls
    from d1_signer.transport.credentials import ClientCertificate
    from d1_signer.transport.proxies import Proxy


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """How D1 is reached.

    Attributes:
        client_cert: Path of the client certificate.
        client_key: Path of its key, or its key URI.
        passphrase_source: Where the key's passphrase comes from.
        ca_file: Path of the authorities for D1's certificate.
        proxy: URL of a proxy.
        proxy_credentials: Source of its credentials, which asks a person once.
        proxy_adds_certificate: Whether the proxy adds the client certificate.
        request_format: How assertions are sent: form or json.
    """

    client_cert: str | None
    client_key: str | None
    passphrase_source: str | None
    ca_file: str | None
    proxy: str | None
    proxy_credentials: SecretSource | None
    proxy_adds_certificate: bool
    request_format: Literal["form", "json"]

    @property
    def given(self) -> bool:
        """Whether any of it is given."""
        named = (
            self.client_cert,
            self.client_key,
            self.passphrase_source,
            self.ca_file,
            self.proxy,
            self.proxy_credentials,
        )
        stated = self.proxy_adds_certificate or self.request_format != "form"
        return stated or any(value is not None for value in named)

    def require(self, environment: Environment | None) -> None:
        """Refuse half of a client certificate, or none for an environment that needs one.

        Raises:
            ConfigurationError: Such settings.
        """
        if self.client_cert is None and self.client_key is None:
            if environment and environment.is_thales and not self.proxy_adds_certificate:
                raise ConfigurationError(
                    "D1 needs a client certificate (mutual TLS) and none is given.",
                    hint="Give --client-cert and --client-key, or set D1_CLIENT_CERT and "
                    "D1_CLIENT_KEY; or state --proxy-adds-certificate.",
                )
        elif self.client_cert is None or self.client_key is None:
            raise ConfigurationError(
                "A client certificate needs its key, and a key its certificate.",
                hint="Give both --client-cert (D1_CLIENT_CERT) and --client-key (D1_CLIENT_KEY).",
            )

    def certificate(self, environment: Environment | None) -> ClientCertificate | None:
        """The client certificate; None where none is given and none is needed.

        Raises:
            ConfigurationError: As for `require`, or it cannot be used.
        """
        self.require(environment)
        if self.client_cert is None or self.client_key is None:
            return None
        return self._certificate_with(self.client_cert, self.client_key)

    def _certificate_with(self, certificate: str, key: str) -> ClientCertificate:
        """The certificate; a signer of its key is closed with the command."""
        from d1_signer.transport.credentials import ClientCertificate

        scheme = scheme_of(key)
        if scheme in {"", "file"}:
            path = KeyUri.parse(key, query_names=frozenset()).path if scheme else key
            return ClientCertificate(certificate, path, passphrase=self.passphrase_source)
        context = click.get_current_context()
        timeout = context.params["timeout"]
        options = BackendOptions(timeout=timeout)
        signer = context.with_resource(open_key(key, options, trail=current_trail()))
        limit = {} if timeout is None else {"timeout": timeout}
        return ClientCertificate(certificate, signer, passphrase=self.passphrase_source, **limit)

    def optional_proxy(self) -> Proxy | None:
        """The proxy, None where none is given.

        Raises:
            ConfigurationError: Its settings cannot be used.
            SecretSourceError: Nor its credentials.
        """
        from d1_signer.transport import proxies

        return proxies.optional_proxy(self.proxy, self.proxy_credentials)

    def fetcher(
        self, signers: Signer | SignerSet, issuer: Issuer, *, tls: ClientTls | None = None
    ) -> TokenFetcher:
        """A fetcher with these settings; the caller closes it.

        Args:
            signers: Sign the assertions.
            issuer: Who asks which D1.
            tls: What was made of the TLS settings before, so that no passphrase is asked for again.
        """
        from d1_signer.token.fetcher import TokenFetcher

        environment = issuer.required_environment()
        settings = settings_in(click.get_current_context())
        return TokenFetcher(
            signers,
            issuer_id=issuer.required_id(),
            environment=environment,
            client_certificate=tls.context() if tls else self.certificate(environment),
            ca_file=None if tls else self.ca_file,
            proxy=self.proxy,
            proxy_credentials_source=self.proxy_credentials,
            proxy_adds_certificate=self.proxy_adds_certificate,
            audience=issuer.audience,
            request_format=self.request_format,
            limits=None if settings is None else settings.limits,
        )


def _asked_once(source: str | None) -> SecretSource | None:
    if source != "prompt":
        return source
    # A command makes several connections, each with settings of its own.
    ask = functools.cache(functools.partial(read_secret, source, what="proxy credentials"))
    return lambda: ask().reveal()


def with_connection(command: Command) -> Command:
    """Give a command the options of `Connection`, as its ``connection``."""

    @setting(
        "--client-cert",
        "D1_CLIENT_CERT",
        "PEM file of the client certificate.",
        metavar="PATH",
        type=FILE,
        callback=checked_path,
    )
    @setting(
        "--client-key",
        "D1_CLIENT_KEY",
        "PEM file of its private key, or a key URI.",
        metavar="PATH|URI",
        type=FILE,
        callback=checked_path_or_key,
    )
    @click.option(
        "--client-key-passphrase-source",
        "passphrase_source",
        metavar="SOURCE",
        help="Where that key's passphrase comes from: file:PATH, env:NAME or prompt.",
    )
    @setting(
        "--ca-file",
        "D1_CA_FILE",
        "PEM file of the authorities for D1's certificate, instead of the public ones.",
        metavar="PATH",
        type=FILE,
        callback=checked_path,
    )
    @click.option(
        "--proxy",
        metavar="URL",
        callback=checked_proxy,
        help="An HTTP proxy that takes CONNECT: http://HOST:PORT.",
    )
    @click.option(
        "--proxy-credentials-source",
        metavar="SOURCE",
        help="Where its USER:PASSWORD comes from: file:PATH, env:NAME or prompt.",
    )
    @click.option(
        "--proxy-adds-certificate",
        is_flag=True,
        help="State that the proxy adds the client certificate.",
    )
    @setting(
        "--request-format",
        "D1_REQUEST_FORMAT",
        "How assertions are sent; json is for gateways that take only that.",
        type=click.Choice(["form", "json"]),
        default="form",
        show_default=True,
    )
    @functools.wraps(command)
    def wrapper(
        *args: Any,
        client_cert: str | None,
        client_key: str | None,
        passphrase_source: str | None,
        ca_file: str | None,
        proxy: str | None,
        proxy_credentials_source: str | None,
        proxy_adds_certificate: bool,
        request_format: Literal["form", "json"],
        **options: Any,
    ) -> Any:
        connection = Connection(
            client_cert=client_cert,
            client_key=client_key,
            passphrase_source=passphrase_source,
            ca_file=ca_file,
            proxy=proxy,
            proxy_credentials=_asked_once(proxy_credentials_source),
            proxy_adds_certificate=proxy_adds_certificate,
            request_format=request_format,
        )
        return command(*args, connection=connection, **options)

    return wrapper
