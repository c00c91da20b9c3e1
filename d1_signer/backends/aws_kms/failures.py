# SPDX-License-Identifier: Apache-2.0
"""What boto3's failures mean.

The codes are those of the AWS KMS API Reference ("Common Error Types", and the errors of each
operation); most are not modelled by boto3 and are read from ``ClientError.response``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from d1_signer import frames
from d1_signer.backends.remote import Details, Failures, Service
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
from d1_signer.transport.failures import Stage, TlsFailure, failure_of
from d1_signer.transport.foreign import quoted


class _ThisCall(threading.local):
    """The call of this thread; botocore passes nothing of ours on to its hooks.

    Attributes:
        until: Until when it may take, on ``time.monotonic()``.
        sent: The secrets that its request holds.
        limits: Seconds for connecting, and for each wait for bytes.
    """

    until: float = 0.0
    sent: tuple[str, ...] = ()
    limits: tuple[float, float] = (2.0, 5.0)


this_call = _ThisCall()

_ALTERED = "Something between this process and AWS KMS alters answers."
_GRANT = "Grant the permission in the role's and in the key's policy."
_CREDENTIALS = "Check the credentials: expired, revoked, or of another account."
_CLOCK = "Check the credentials, and this machine's clock."
_SLOWER = "Ask for a higher quota, or reuse tokens longer."
_LATER = "Try again later; see the AWS Health Dashboard."
_KIND = "D1 takes ES256 only: use an ECC_NIST_P256 key for SIGN_VERIFY."
_STORE = "Look at the key's custom key store: keys for D1 are made without one by default."
_POLICY = "Make the key in the console or with a template, where its policy can be written."
_REQUEST = "Check the key and the region; else report it, with the versions of boto3 and botocore."
_DISABLED = "Find out who disabled it (CloudTrail: DisableKey), then enable it in AWS KMS."
_REPORT = "Report it, with the versions of boto3 and botocore."

# What AWS KMS answers: the error, and what to do. Whether a retry helps is the error's own.
CODES: dict[str, tuple[type[D1SignerError], str]] = {
    # The key.
    "NotFoundException": (KeyNotFoundError, "Check key, alias, account and region."),
    "InvalidArnException": (KeyUriError, "Check the ARN in the key URI."),
    "InvalidAliasNameException": (KeyUriError, "Write alias/ and letters, digits, / _ -."),
    "AlreadyExistsException": (KeyExistsError, "Choose another alias."),
    "DisabledException": (KeyDisabledError, _DISABLED),
    "KMSInvalidStateException": (KeyDisabledError, "Look at the key's state in AWS KMS."),
    "KeyUnavailableException": (SignerUnavailable, _LATER),
    "InvalidKeyUsageException": (InvalidKeyError, _KIND),
    "UnsupportedOperationException": (InvalidKeyError, _KIND),
    # Who asks.
    "AccessDeniedException": (AccessDeniedError, _GRANT),
    "AccessDenied": (AccessDeniedError, _GRANT),
    "OptInRequired": (AccessDeniedError, "Subscribe the account to AWS KMS."),
    "InvalidGrantTokenException": (AccessDeniedError, "Look at the key's grants."),
    "UnrecognizedClientException": (LoginError, _CREDENTIALS),
    "InvalidClientTokenId": (LoginError, _CREDENTIALS),
    "ExpiredToken": (LoginError, _CREDENTIALS),
    "ExpiredTokenException": (LoginError, _CREDENTIALS),
    "MissingAuthenticationToken": (LoginError, _CREDENTIALS),
    "MissingAuthenticationTokenException": (LoginError, _CREDENTIALS),
    "NotAuthorized": (LoginError, _CREDENTIALS),
    "IncompleteSignature": (LoginError, _CLOCK),
    "IncompleteSignatureException": (LoginError, _CLOCK),
    "SignatureDoesNotMatch": (LoginError, _CLOCK),
    "InvalidSignatureException": (LoginError, _CLOCK),
    "RequestExpired": (LoginError, _CLOCK),
    "RequestTimeTooSkewed": (LoginError, _CLOCK),
    # The service.
    "ThrottlingException": (SignerThrottled, _SLOWER),
    "Throttling": (SignerThrottled, _SLOWER),
    "RequestLimitExceeded": (SignerThrottled, _SLOWER),
    "TooManyRequestsException": (SignerThrottled, _SLOWER),
    "KMSInternalException": (SignerUnavailable, _LATER),
    "KMSInternal": (SignerUnavailable, _LATER),
    "DependencyTimeoutException": (SignerUnavailable, _LATER),
    "DependencyTimeout": (SignerUnavailable, _LATER),
    "InternalFailure": (SignerUnavailable, _LATER),
    "ServiceUnavailable": (SignerUnavailable, _LATER),
    "ServiceUnavailableException": (SignerUnavailable, _LATER),
    "RequestAbortedException": (SignerUnavailable, _LATER),
    "RequestTimeoutException": (SignerTimeout, "Check the network between here and AWS KMS."),
    # Making a key.
    "LimitExceededException": (SignerError, "The account's quota of keys or aliases is used up."),
    "CustomKeyStoreNotFoundException": (ConfigurationError, _STORE),
    "CustomKeyStoreInvalidStateException": (SignerError, _STORE),
    "CloudHsmClusterInvalidConfigurationException": (SignerError, _STORE),
    "XksKeyAlreadyInUseException": (ConfigurationError, _STORE),
    "XksKeyInvalidConfigurationException": (ConfigurationError, _STORE),
    "XksKeyNotFoundException": (ConfigurationError, _STORE),
    "MalformedPolicyDocumentException": (ConfigurationError, _POLICY),
    "TagException": (ConfigurationError, _POLICY),
    # A request that AWS KMS does not understand.
    "ValidationException": (SignerError, _REQUEST),
    "ValidationError": (SignerError, _REQUEST),
    "DryRunOperationException": (SignerError, _REPORT),
    "MalformedHttpRequestException": (IntegrityError, _ALTERED),
    "RequestEntityTooLargeException": (IntegrityError, _ALTERED),
    "UnknownOperationException": (
        ConfigurationError,
        "Check the endpoint: what answers there is not AWS KMS, or is not all of it.",
    ),
}

# The states of a key (AWS KMS Developer Guide, "Key states of AWS KMS keys"): what to do, and
# whether it passes. KMS names them in words where it refuses.
STATES: dict[str, tuple[str, bool]] = {
    "Creating": ("The key is being made: try again in a moment.", True),
    "Updating": ("The key is being updated: try again in a moment.", True),
    "Disabled": (_DISABLED, False),
    "PendingDeletion": ("Cancel the key's deletion in AWS KMS, and enable it.", False),
    "PendingReplicaDeletion": ("Its deletion waits for that of its replicas.", False),
    "PendingImport": ("Import the key material, or use a key that AWS KMS made.", False),
    "Unavailable": ("The key store of the key is disconnected: look at it.", True),
}
_STATE_IN_WORDS = re.compile(
    r"\b(creating|updating|disabled|unavailable|pending ?(?:replica ?)?(?:deletion|import))\b",
    re.IGNORECASE,
)
_BY_WORDS = {state.lower(): state for state in STATES}

_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NOT_READ = (ResponseParserError, ValueError, TypeError, AttributeError, LookupError)

# In this order: a class before the classes it derives from.
_FAILURES: Failures = (
    ((sdk.ResponseStreamingError,), IntegrityError, _ALTERED),
    ((sdk.ParamValidationError,), KeyUriError, "Check the key URI."),
    (
        (sdk.NoRegionError,),
        ConfigurationError,
        "Name a region: ?region= in the key URI, or AWS_DEFAULT_REGION, which boto3 reads.",
    ),
    ((sdk.ProfileNotFound, sdk.ConfigParseError), ConfigurationError, "Check the AWS profile."),
    ((sdk.BotoCoreError,), ConfigurationError, "Check the AWS configuration of this process."),
    # What botocore's parsers raise where an answer has another shape than the service's.
    ((*_NOT_READ, RecursionError), IntegrityError, _ALTERED),
)


def quotable(code: str) -> str:
    """A code or an id as it is where it looks like one and repeats no secret, else quoted."""
    shown = quoted(code, this_call.sent)
    return code if _CODE.fullmatch(code) and shown[1:-1] == code else shown


def answered(error: sdk.ClientError) -> tuple[str, str, int]:
    """The code, the message and the HTTP status of an answer that refuses."""
    told = error.response.get("Error", {})
    metadata = error.response.get("ResponseMetadata", {})
    message = told.get("Message") or told.get("message") or ""
    return str(told.get("Code") or "unknown"), str(message), int(metadata.get("HTTPStatusCode", 0))


def described(error: sdk.ClientError, code: str) -> Details:
    """What a machine may want of such an answer."""
    return {"aws_code": quotable(code), **details(error.response)}


def details(answer: Mapping[str, Any]) -> Details:
    """What of an answer's metadata goes into an error: request id and HTTP status."""
    metadata = answer.get("ResponseMetadata", {})
    found: Details = {}
    request_id = str(metadata.get("RequestId"))
    if metadata.get("RequestId"):
        found["request_id"] = quotable(request_id)
    if isinstance(metadata.get("HTTPStatusCode"), int):
        found["status"] = metadata["HTTPStatusCode"]
    return found


def of_connection(error: Exception, name: str, doing: str, details: Details) -> D1SignerError:
    """The error where no answer came: at which stage it failed, and why."""
    kwargs = getattr(error, "kwargs", {})
    endpoint, proxy = kwargs.get("endpoint_url"), kwargs.get("proxy_url")
    failed = failure_of(error, connect=this_call.limits[0], read=this_call.limits[1])
    kind: type[SignerError] = SignerUnavailable
    hint, retryable = "Check the network, the endpoint and the region.", True
    where = f"{name} at {endpoint}" if endpoint else name
    if failed.stage is Stage.PROXY:
        proxy = failed.refused.proxy if failed.refused else proxy
        hint = "Look at the proxy: what it logs of this, and whether it admits the endpoint."
        if failed.refused is not None:
            hint, retryable = failed.refused.hint, failed.refused.passes
            details = {**details, **failed.refused.details()}
    elif failed.stage is Stage.TLS and failed.tls is TlsFailure.UNTRUSTED:
        hint, retryable = _authorities(name), False
    elif failed.stage is Stage.TLS:
        hint = "Check the endpoint, and what stands before it."
    elif isinstance(error, sdk.ReadTimeoutError | sdk.ConnectTimeoutError):
        kind, hint = SignerTimeout, "Check that the endpoint can be reached."
    return kind(
        f"{where} could not be asked {doing}: {failed.told(proxy)}.",
        hint=hint,
        retryable=retryable,
        details={**details, "stage": failed.stage.value},
    )


def _authorities(name: str) -> str:
    if name == AWS_KMS.name:
        return (
            "Name the file with the authority as ca_file (AWS_CA_BUNDLE is not used for AWS KMS), "
            "and check the host name."
        )
    return "Name the file with the authority in AWS_CA_BUNDLE, and check the host name."


def _refused(error: Exception, doing: str) -> D1SignerError | None:
    # What our sender raised stands in botocore's own error.
    ours = next((link for link in frames.causes(error) if isinstance(link, D1SignerError)), None)
    if ours is not None:
        return ours.with_traceback(None)
    if isinstance(error, sdk.HTTPClientError | sdk.ConnectionError | HTTPError | OSError):
        if isinstance(error, sdk.ResponseStreamingError):
            return None
        return of_connection(error, AWS_KMS.name, doing, {"sdk_error": type(error).__name__})
    return _of_answer(error, doing) if isinstance(error, sdk.ClientError) else None


def _of_answer(error: sdk.ClientError, doing: str) -> D1SignerError:
    code, message, status = answered(error)
    if code in CODES:
        meaning = CODES[code]
    elif status == _TOO_MANY_REQUESTS:
        meaning = (SignerThrottled, _SLOWER)
    elif status >= _SERVER_ERROR:
        meaning = (SignerUnavailable, _LATER)
    else:
        meaning = (SignerError, "See the code in the AWS KMS API Reference.")
    kind, hint = meaning
    retryable = None
    told = quoted(message, this_call.sent) if message else ""
    if kind is KeyDisabledError and (found := _STATE_IN_WORDS.search(message)):
        hint, retryable = STATES[_BY_WORDS[found[1].lower().replace(" ", "")]]
    if kind is LoginError:
        # About a wrong signature, it quotes the signed headers, the session token among them.
        told = ""
    known = described(error, code)
    number = f" (request {known['request_id']})" if "request_id" in known else ""
    text = f"AWS KMS refused {doing}: {quotable(code)}{f' {told}' if told else ''}{number}."
    return kind(text, hint=hint, retryable=retryable, details=known)


AWS_KMS = Service(
    name="AWS KMS",
    packages="boto3 and botocore",
    altered_hint=_ALTERED,
    failures=_FAILURES,
    refused=_refused,
)
