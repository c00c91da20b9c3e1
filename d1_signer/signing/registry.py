# SPDX-License-Identifier: Apache-2.0
"""Which module serves which URI scheme: the built-in ones, and plug-ins by entry point."""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from d1_signer.errors import ConfigurationError, D1SignerError, KeyUriError, SignerUnavailable
from d1_signer.frames import of_signal_handler
from d1_signer.signing.backend import Backend, BackendModule, guarded
from d1_signer.signing.key_uri import scheme_of

_log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "d1_signer.backends"

BUILT_IN = {
    "awskms": "d1_signer.backends.aws_kms",
    "file": "d1_signer.backends.pem",
    "gcpkms": "d1_signer.backends.gcp_kms",
    "hashivault": "d1_signer.backends.vault",
    "pkcs11": "d1_signer.backends.pkcs11",
}

_USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def load_backend_module(uri: str) -> BackendModule:
    """Find the module that serves a URI's scheme: a built-in one, else a plug-in's.

    Raises:
        KeyUriError: Nothing serves the scheme.
        MissingExtraError: The backend's optional dependency is not installed.
        ConfigurationError: Two plug-ins serve the scheme, or the module cannot be loaded.
        SignerUnavailable: It cannot be loaded now: open files or memory are used up.
    """
    scheme = scheme_of(uri)
    if scheme in BUILT_IN:
        try:
            return importlib.import_module(BUILT_IN[scheme])
        except OSError as error:
            why, passes = error.strerror or type(error).__name__, error.errno in _USED_UP
        told = f"The module of d1_signer for {scheme}: keys cannot be loaded: {why}."
        if passes:
            raise SignerUnavailable(
                told,
                hint="Look at the limits of this process, such as that of open files (LimitNOFILE, "
                "ulimit -n).",
            )
        raise ConfigurationError(told, hint="Check the installation of d1-signer, by importing it.")
    found = list(entry_points(group=ENTRY_POINT_GROUP, name=scheme)) if scheme else []
    if len(found) == 1:
        try:
            module: BackendModule = found[0].load()
        except D1SignerError:
            raise
        except Exception as error:
            if of_signal_handler(error):
                raise
            kind = type(error).__name__
        else:
            _log.info("backend.plug_in scheme=%s %s", scheme, _told(found[0]))
            return module
        # Away from the plug-in's error, whose text may hold anything.
        raise ConfigurationError(
            f"The plug-in {found[0].value} for {scheme}: cannot be loaded ({kind}).",
            hint="Check its installation, by importing it.",
        )
    if found:
        values = ", ".join(sorted(point.value for point in found))
        raise ConfigurationError(
            f"More than one plug-in serves {scheme}: {values}.", hint="Uninstall all but one."
        )
    plugged = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    known = ", ".join(f"{name}:" for name in sorted({*BUILT_IN, *plugged}))
    # Not the URI itself: what has no scheme of ours may be anything, a key or a password even.
    told = f"Nothing serves {scheme}:." if scheme else "The key URI has no scheme."
    raise KeyUriError(told, hint=f"Known schemes: {known}.")


def plug_in_of(backend: Backend) -> str | None:
    """Whose a backend's code is: distribution, version and class; None for a built-in one."""
    module, kind = type(backend).__module__, type(backend).__qualname__
    package = module.partition(".")[0]
    if package == __name__.partition(".")[0]:
        return None
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.module.partition(".")[0] == package and point.dist is not None:
            return f"{point.dist.name} {point.dist.version} ({module}.{kind})"
    return f"{module}.{kind}"


def _told(point: EntryPoint) -> str:
    distribution = point.dist
    of = "" if distribution is None else f"{distribution.name} {distribution.version} "
    return f"{of}({point.value})"


def option_names(function: Callable[..., Any]) -> list[str]:
    """The options that a function of a backend's module takes beside the URI."""
    _, *options = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [option.name for option in options if option.kind in kinds]


def call_backend(module: BackendModule, name: str, uri: str, options: dict[str, Any]) -> Any:
    """Call a function of a backend's module with options that fit it.

    Raises:
        ConfigurationError: The module has no such function, or an option does not fit.
        SignerError: Whatever the function raises.
    """
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigurationError(
            f"The plug-in for {scheme_of(uri)}: has no {name}().", hint="Check its installation."
        )
    try:
        inspect.signature(function).bind(uri, **options)
    except TypeError:
        known = option_names(function)
        unknown = ", ".join(sorted(set(options) - set(known))) or "a required one is missing"
        raise ConfigurationError(
            f"Options that do not fit {scheme_of(uri)}: {unknown}.",
            hint=f"Known here: {', '.join(known) or 'none'}.",
        ) from None
    return guarded(f"{scheme_of(uri)}:", function, uri, **options)
