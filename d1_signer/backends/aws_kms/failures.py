# SPDX-License-Identifier: Apache-2.0
"""What boto3's failures mean.

The codes are those of the AWS KMS API Reference ("Common Errors", and the errors of each
operation); most are not modelled by boto3 and are read from ``ClientError.response``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from d1_signer.errors import (
    AccessDeniedError,
    ConfigurationError,
    D1SignerError,
    IntegrityError,
    InvalidKeyError,
    KeyDisabledError,
    KeyExistsError,
    KeyNotFoundError,
    KeyUriError,
    LoginError,
    SignerError,
    SignerThrottled,
    SignerTimeout,
    SignerUnavailable,
)
from d1_signer.transport.failures import is_untrusted

P = ParamSpec("P")
R = TypeVar("R")
Failure = type[D1SignerError]

ALTERED = "Something between this process and AWS KMS alters answers."
_LONGEST = 400

_DENIED = (AccessDeniedError, "Grant the permission in the role's and in the key's policy.")
_CREDENTIALS = (LoginError, "Check the credentials: expired, revoked, or of another account.")
_CLOCK = (LoginError, "Check the credentials, and this machine's clock.")
_SLOWER = (SignerThrottled, "Ask for a higher quota, or reuse tokens longer.")
_LATER = (SignerUnavailable, "Try again later; see the AWS Health Dashboard.")
_KIND = (InvalidKeyError, "D1 takes ES256 only: use an ECC_NIST_P256 key for SIGN_VERIFY.")

_CODES: dict[str, tuple[Failure, str]] = {
    "NotFoundException": (KeyNotFoundError, "Check key, alias, account and region."),
    "AccessDeniedException": _DENIED,
    "AccessDenied": _DENIED,
    "OptInRequired": _DENIED,
    "DisabledException": (KeyDisabledError, "Enable the key in AWS KMS."),
    "KMSInvalidStateException": (
        KeyDisabledError,
        "Look at the key's state: pending deletion or import, or its key store is away.",
    ),
    "InvalidKeyUsageException": _KIND,
    "UnsupportedOperationException": _KIND,
    "InvalidArnException": (KeyUriError, "Check the ARN in the key URI."),
    "AlreadyExistsException": (KeyExistsError, "Choose another alias."),
    "UnrecognizedClientException": _CREDENTIALS,
    "InvalidClientTokenId": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "ExpiredTokenException": _CREDENTIALS,
    "MissingAuthenticationToken": _CREDENTIALS,
    "MissingAuthenticationTokenException": _CREDENTIALS,
    "IncompleteSignature": _CREDENTIALS,
    "IncompleteSignatureException": _CREDENTIALS,
    "NotAuthorized": _CREDENTIALS,
    "SignatureDoesNotMatch": _CLOCK,
    "InvalidSignatureException": _CLOCK,
    "RequestExpired": _CLOCK,
    "RequestTimeTooSkewed": _CLOCK,
    "ThrottlingException": _SLOWER,
    "Throttling": _SLOWER,
    "RequestLimitExceeded": _SLOWER,
    "TooManyRequestsException": _SLOWER,
    "LimitExceededException": (SignerError, "The account's quota of keys or aliases is used up."),
    "KMSInternalException": _LATER,
    "DependencyTimeoutException": _LATER,
    "KeyUnavailableException": _LATER,
    "InternalFailure": _LATER,
    "ServiceUnavailable": _LATER,
    "ServiceUnavailableException": _LATER,
}

_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500

# In this order: a class before the classes it derives from.
_EXCEPTIONS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], Failure, str], ...] = (
    ((sdk.NoRegionError,), ConfigurationError, "Name a region: ?region= or AWS_REGION."),
    ((sdk.ProfileNotFound, sdk.ConfigParseError), ConfigurationError, "Check the AWS profile."),
    (
        (
            sdk.NoCredentialsError,
            sdk.PartialCredentialsError,
            sdk.CredentialRetrievalError,
            sdk.TokenRetrievalError,
            sdk.UnauthorizedSSOTokenError,
            sdk.SSOTokenLoadError,
            sdk.InfiniteLoopConfigError,
        ),
        LoginError,
        "Give credentials in one of the ways that boto3 knows.",
    ),
    (
        (sdk.ReadTimeoutError, sdk.ConnectTimeoutError),
        SignerTimeout,
        "Check that the endpoint can be reached.",
    ),
    ((sdk.SSLError,), SignerUnavailable, "TLS failed: check the CA bundle and the endpoint."),
    ((ResponseParserError, sdk.ResponseStreamingError), IntegrityError, ALTERED),
    (
        (sdk.HTTPClientError, sdk.ConnectionError, HTTPError, OSError),
        SignerUnavailable,
        "Check the network, the endpoint and the region.",
    ),
    ((sdk.ParamValidationError,), KeyUriError, "Check the key URI."),
    (
        (sdk.BotoCoreError, ValueError),
        ConfigurationError,
        "Check the AWS configuration of this process.",
    ),
)


def ask(doing: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call the SDK and translate its failure.

    The SDK's exception is left behind altogether, also as a context: it may carry the request with
    its security token.

    Args:
        doing: What is asked for, such as ``"to sign"``.
        function: The SDK's function.
        *args: Its arguments.
        **kwargs: Its arguments.
    """
    try:
        return function(*args, **kwargs)
    except D1SignerError as error:
        # Of our own: the frames below hold the request too.
        failure = error.with_traceback(None)
    except sdk.ClientError as error:
        failure = _refused(error, doing)
    except Exception as error:  # noqa: BLE001 (nothing of an SDK may get out)
        failure = _failed(error, doing)
    failure.__context__ = None
    raise failure


def details(answer: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What of an answer's metadata goes into an error: request id and HTTP status."""
    metadata = answer.get("ResponseMetadata", {})
    found = {"request_id": metadata.get("RequestId"), "status": metadata.get("HTTPStatusCode")}
    return {name: value for name, value in found.items() if value is not None}


def _refused(error: sdk.ClientError, doing: str) -> D1SignerError:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    told = error.response.get("Error", {})
    code = str(told.get("Code") or "unknown")
    if code in _CODES:
        kind, hint = _CODES[code]
    elif status == _TOO_MANY_REQUESTS:
        kind, hint = _SLOWER
    elif status >= _SERVER_ERROR:
        kind, hint = _LATER
    else:
        kind, hint = SignerError, "See the code in the AWS KMS API Reference."
    text = f"AWS KMS refused {doing}: {code}."
    message = str(told.get("Message") or told.get("message") or "")
    # A message about a wrong signature quotes the signed headers, the session token among them.
    if kind is not LoginError and message.isprintable() and len(message) <= _LONGEST:
        text = f"{text[:-1]} ({message})."
    return kind(text, hint=hint, details={"aws_code": code, **details(error.response)})


def _failed(error: Exception, doing: str) -> D1SignerError:
    name = type(error).__name__
    for kinds, failure, hint in _EXCEPTIONS:
        if isinstance(error, kinds):
            retryable = False if is_untrusted(error) else None
            text = f"AWS KMS could not be asked {doing}: {name}."
            return failure(text, hint=hint, retryable=retryable, details={"sdk_error": name})
    return SignerError(
        f"The AWS SDK failed {doing}: {name}.",
        hint="Report it, with the versions of boto3 and botocore.",
        details={"sdk_error": name},
    )
