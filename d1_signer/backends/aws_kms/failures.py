# SPDX-License-Identifier: Apache-2.0
"""What boto3's failures mean.

The codes are those of the AWS KMS API Reference ("Common Errors", and the errors of each
operation); most are not modelled by boto3 and are read from ``ClientError.response``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from d1_signer.backends.remote import Details, Failures, Meaning, Service
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

_ALTERED = "Something between this process and AWS KMS alters answers."
_DENIED = (AccessDeniedError, "Grant the permission in the role's and in the key's policy.")
_CREDENTIALS = (LoginError, "Check the credentials: expired, revoked, or of another account.")
_CLOCK = (LoginError, "Check the credentials, and this machine's clock.")
_SLOWER = (SignerThrottled, "Ask for a higher quota, or reuse tokens longer.")
_LATER = (SignerUnavailable, "Try again later; see the AWS Health Dashboard.")
_KIND = (InvalidKeyError, "D1 takes ES256 only: use an ECC_NIST_P256 key for SIGN_VERIFY.")

_CODES: dict[str, Meaning] = {
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
_FAILURES: Failures = (
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
    ((ResponseParserError, sdk.ResponseStreamingError), IntegrityError, _ALTERED),
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


def details(answer: Mapping[str, Any]) -> Details:
    """What of an answer's metadata goes into an error: request id and HTTP status."""
    metadata = answer.get("ResponseMetadata", {})
    found = {"request_id": metadata.get("RequestId"), "status": metadata.get("HTTPStatusCode")}
    return {name: value for name, value in found.items() if value is not None}


def _refused(error: Exception, doing: str) -> D1SignerError | None:
    if not isinstance(error, sdk.ClientError):
        return None
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    told = error.response.get("Error", {})
    code = str(told.get("Code") or "unknown")
    if code in _CODES:
        meaning = _CODES[code]
    elif status == _TOO_MANY_REQUESTS:
        meaning = _SLOWER
    elif status >= _SERVER_ERROR:
        meaning = _LATER
    else:
        meaning = (SignerError, "See the code in the AWS KMS API Reference.")
    message = str(told.get("Message") or told.get("message") or "")
    if meaning[0] is LoginError:
        # About a wrong signature, it quotes the signed headers, the session token among them.
        message = ""
    described = {"aws_code": code, **details(error.response)}
    return AWS_KMS.refusal(doing, code, message, meaning, described)


AWS_KMS = Service(
    name="AWS KMS",
    packages="boto3 and botocore",
    altered_hint=_ALTERED,
    failures=_FAILURES,
    refused=_refused,
)
