# SPDX-License-Identifier: Apache-2.0
"""What goes wrong where boto3 looks for credentials: STS, files, a container's endpoint, SSO.

The codes are those of the AWS STS API Reference.
"""

from __future__ import annotations

import json
import os
import re
from typing import Final

from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from d1_signer.backends.aws_kms.failures import answered, described, of_connection, quotable
from d1_signer.backends.remote import Details, Service
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    LoginError,
    SignerError,
    SignerThrottled,
    SignerUnavailable,
)
from d1_signer.secret import shown_path
from d1_signer.transport.foreign import quoted

_PHASE: Final = "credentials"
_SOURCES = "Give credentials in one of the ways that boto3 knows; see docs/cloud/aws.md."
_BASE = "Check the credentials with which the role is assumed: expired, revoked, or mistyped."
_CLOCK = "Check the credentials, and this machine's clock."
_LATER = "Try again later; see the AWS Health Dashboard."

# What STS answers: the error, what to do, and whether trying again can help.
STS: dict[str, tuple[type[SignerError], str, bool]] = {
    "AccessDenied": (
        LoginError,
        "Let the role's trust policy admit this identity, and its policy sts:AssumeRole.",
        False,
    ),
    "AccessDeniedException": (
        LoginError,
        "Let the role's trust policy admit this identity, and its policy sts:AssumeRole.",
        False,
    ),
    "InvalidIdentityToken": (
        LoginError,
        "Check the token file, and the identity provider that IAM knows.",
        False,
    ),
    "IDPRejectedClaim": (
        LoginError,
        "The identity provider rejects the token: expired, revoked, or for another audience.",
        False,
    ),
    "IDPCommunicationError": (
        SignerUnavailable,
        "AWS STS does not reach the identity provider; try again.",
        True,
    ),
    "ExpiredTokenException": (
        LoginError,
        "The token has expired: look at what renews its file.",
        True,
    ),
    "ExpiredToken": (LoginError, _BASE, True),
    "InvalidClientTokenId": (LoginError, _BASE, False),
    "UnrecognizedClientException": (LoginError, _BASE, False),
    "SignatureDoesNotMatch": (LoginError, _CLOCK, False),
    "MalformedPolicyDocument": (LoginError, "Check the session policy of the profile.", False),
    "PackedPolicyTooLarge": (LoginError, "Shorten the session policy and tags.", False),
    "RegionDisabledException": (
        LoginError,
        "Activate AWS STS for this region in IAM, or set AWS_STS_REGIONAL_ENDPOINTS.",
        False,
    ),
    "ValidationError": (LoginError, "Check role_arn, role_session_name and duration.", False),
    "UnauthorizedException": (LoginError, "Run aws sso login.", False),
    "ForbiddenException": (LoginError, "Check sso_account_id and sso_role_name.", False),
    "Throttling": (SignerThrottled, "Assume roles less often, or try again later.", True),
    "ThrottlingException": (SignerThrottled, "Assume roles less often, or try again later.", True),
    "TooManyRequestsException": (SignerThrottled, "Try again later.", True),
}

_UNREADABLE = (
    "What gives the credentials (AWS STS, the container's endpoint, credential_process) answers "
    "without them: look at it, and try again."
)
_SHAPES = (KeyError, TypeError, AttributeError)
_CONTAINER = "AWS_CONTAINER_CREDENTIALS"
_SERVER_ERROR = 500
_STS_OPERATION = re.compile(r"(AssumeRole|GetSessionToken|GetFederationToken)")
_RETRYABLE = True


def no_credentials(text: str, *, retryable: bool) -> LoginError:
    """The error where there are none."""
    return LoginError(text, hint=_SOURCES, retryable=retryable, details={"phase": _PHASE})


def _of_answer(error: sdk.ClientError) -> D1SignerError:
    operation = str(error.operation_name)
    service = "AWS STS" if _STS_OPERATION.match(operation) else "The AWS sign-in service"
    code, message, status = answered(error)
    kind, hint, retryable = STS.get(code, (LoginError, _SOURCES, False))
    if code not in STS and status >= _SERVER_ERROR:
        kind, hint, retryable = SignerUnavailable, _LATER, True
    # About a wrong signature, it quotes the signed headers, the session token among them.
    told = f" {quoted(message)}" if message and code != "SignatureDoesNotMatch" else ""
    details: Details = {"phase": _PHASE, "operation": operation, **described(error, code)}
    return kind(
        f"{service} refused {operation}: {quotable(code)}{told}.",
        hint=hint,
        retryable=retryable,
        details=details,
    )


def _of_file(error: OSError) -> D1SignerError:
    path = str(error.filename)
    named = [name for name, value in os.environ.items() if value == path and name[:4] == "AWS_"]
    source = f"that {named[0]} names" if named else "of the AWS configuration"
    return LoginError(
        f"The file {source} cannot be read: {shown_path(path)}: {error.strerror}.",
        hint="Check the path, and that this process's user may read it.",
        details={"phase": _PHASE},
    )


def _of_provider(error: sdk.CredentialRetrievalError) -> D1SignerError:
    provider, told = str(error.kwargs.get("provider")), str(error.kwargs.get("error_msg"))
    details: Details = {"phase": _PHASE, "source": quotable(provider)}
    if provider == "container-role":
        relative = os.environ.get(f"{_CONTAINER}_RELATIVE_URI")
        whole = os.environ.get(f"{_CONTAINER}_FULL_URI", "")
        details["endpoint"] = f"http://169.254.170.2{relative}" if relative else whole
        kind: type[SignerError] = SignerUnavailable
        hint = (
            "Look at the container's credential endpoint, which AWS_CONTAINER_CREDENTIALS_FULL_URI "
            "or AWS_CONTAINER_CREDENTIALS_RELATIVE_URI names."
        )
    else:
        kind, hint = LoginError, "Run what gives the credentials by hand, and look at what it says."
    return kind(
        f"{quotable(provider)} gave no AWS credentials: {quoted(told)}.",
        hint=hint,
        retryable=_RETRYABLE,
        details=details,
    )


# In this order: a class before the classes it derives from.
_FAILURES: tuple[tuple[tuple[type[Exception], ...], type[D1SignerError], str, bool], ...] = (
    (
        (sdk.UnauthorizedSSOTokenError, sdk.SSOTokenLoadError, sdk.TokenRetrievalError),
        LoginError,
        "Run aws sso login.",
        False,
    ),
    ((sdk.ProfileNotFound, sdk.ConfigParseError), ConfigurationError, "Check the profile.", False),
    (
        (ResponseParserError, json.JSONDecodeError, UnicodeError, *_SHAPES),
        SignerUnavailable,
        _UNREADABLE,
        True,
    ),
    # What botocore raises where the keys that it was given have ended.
    (
        (RuntimeError,),
        LoginError,
        "What gives the credentials gives some that have ended: look at it, and at the clock.",
        True,
    ),
    ((sdk.MetadataRetrievalError,), SignerUnavailable, "Look at the metadata service.", True),
    ((sdk.BotoCoreError,), LoginError, _SOURCES, False),
    ((ValueError,), ConfigurationError, "Check the AWS configuration of this process.", False),
)


def _refused(error: Exception, _doing: str) -> D1SignerError | None:
    if isinstance(error, sdk.ClientError):
        return _of_answer(error)
    if isinstance(error, sdk.CredentialRetrievalError):
        return _of_provider(error)
    if isinstance(error, OSError) and error.filename:
        return _of_file(error)
    name = type(error).__name__
    details: Details = {"phase": _PHASE, "sdk_error": name}
    if isinstance(error, sdk.HTTPClientError | sdk.ConnectionError | HTTPError | OSError):
        return of_connection(error, "The source of AWS credentials", "for credentials", details)
    if type(error).__module__.startswith("dateutil."):  # a date that is none, in an answer
        error = TypeError()
    for kinds, kind, hint, retryable in _FAILURES:
        if isinstance(error, kinds):
            text = f"boto3 finds no AWS credentials: {name}."
            return kind(text, hint=hint, retryable=retryable, details=details)
    return None


AWS_CREDENTIALS = Service(
    name="The source of AWS credentials",
    packages="boto3 and botocore",
    altered_hint="Look at what gives the credentials.",
    failures=(),
    refused=_refused,
)
