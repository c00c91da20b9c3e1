# SPDX-License-Identifier: Apache-2.0
"""The tree of errors: as documented, and whole after copying, pickling and crossing processes."""

from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
import re
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import pytest

from d1_signer import errors
from d1_signer.errors import D1SignerError, MissingExtraError, TokenRefusedError


def every_class() -> list[type[D1SignerError]]:
    found: list[type[D1SignerError]] = [D1SignerError]
    for kind in found:
        found += [below for below in kind.__subclasses__() if below.__module__ == errors.__name__]
    return found


CLASSES = every_class()
Each = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def make(kind: type[D1SignerError]) -> D1SignerError:
    details: dict[str, str | int | float] = {"n": 1}
    if issubclass(kind, TokenRefusedError):
        return kind("text", status=418, error="invalid_grant", hint="do it", details=details)
    return kind("text", hint="do it", retryable=not kind.default_retryable, details=details)


def test_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    line = re.compile(r"^ {4}((?:[│ ]   )*(?:[├└]── )?)(\w+)(?: \[(\w+)\] +(.*)| \[(\w+)\])?$")
    stack: list[str] = []
    documented: dict[str, tuple[str | None, str | None, bool]] = {}
    for text in (errors.__doc__ or "").splitlines():
        read = line.match(text)
        if not read or not hasattr(errors, read[2]):
            continue
        depth = len(read[1]) // 4
        stack[depth:] = [read[2]]
        parent = stack[depth - 1] if depth else None
        retryable = (read[4] or "").endswith("retryable")
        documented[read[2]] = (parent, read[3] or read[5], retryable)
    real = {
        kind.__name__: (
            None if kind is D1SignerError else kind.__bases__[0].__name__,
            None if kind is D1SignerError else kind.code,
            kind.default_retryable,
        )
        for kind in CLASSES
    }
    assert {name: entry[:2] for name, entry in documented.items()} == {
        name: entry[:2] for name, entry in real.items()
    }
    assert {name for name, entry in documented.items() if entry[2]} == {
        name for name, entry in real.items() if entry[2]
    }


def test_codes_are_unique_and_stable_in_form() -> None:
    codes = [kind.code for kind in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)
    assert all("code" in vars(kind) for kind in CLASSES), "each class has a code of its own"


def test_every_class_is_documented_and_public() -> None:
    import d1_signer

    assert {kind.__name__ for kind in CLASSES} <= set(d1_signer.__all__)
    assert all(kind.__doc__ for kind in CLASSES)


def same(one: D1SignerError, other: D1SignerError) -> None:
    assert type(one) is type(other)
    assert one.args == other.args
    assert vars(one) == vars(other)
    assert str(one) == str(other) == "text do it"
    assert one.to_dict() == other.to_dict()


@Each
def test_fresh_keeps_everything_but_the_traceback(kind: type[D1SignerError]) -> None:
    error = make(kind)
    cause = ValueError("cause")
    with pytest.raises(kind):  # noqa: PT012
        try:
            raise KeyError  # noqa: TRY301
        except KeyError:
            raise error from cause
    error.add_note("note")
    twin = error.fresh()
    same(error, twin)
    assert twin is not error
    assert twin.__cause__ is cause
    assert twin.__traceback__ is None
    assert twin.__context__ is None
    assert twin.__notes__ == ["note"]
    twin.details["n"] = 2
    assert error.details["n"] == 1


def test_fresh_errors_do_not_grow_into_each_other() -> None:
    error = make(TokenRefusedError)
    lengths = []
    for _ in range(3):
        try:
            raise error.fresh()
        except TokenRefusedError as caught:
            lengths.append(len(traceback.extract_tb(caught.__traceback__)))
    assert all(one == other for one, other in pairwise(lengths))


@Each
@pytest.mark.parametrize(
    "leave",
    [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy],  # noqa: S301
)
def test_errors_survive_copying(
    kind: type[D1SignerError], leave: Callable[[D1SignerError], D1SignerError]
) -> None:
    error = make(kind)
    same(error, leave(error))


def refuse_in_a_worker() -> None:
    raise make(TokenRefusedError)


def test_errors_cross_a_process_pool() -> None:
    # An exception that cannot be read back breaks the pool, and its caller never learns why.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        error = pool.submit(refuse_in_a_worker).exception(timeout=30)
    assert isinstance(error, TokenRefusedError)
    assert (error.status, error.error, error.hint) == (418, "invalid_grant", "do it")


@Each
def test_to_dict_is_json(kind: type[D1SignerError]) -> None:
    error = make(kind)
    assert json.loads(json.dumps(error.to_dict())) == {
        "code": kind.code,
        "message": "text",
        "hint": "do it",
        "retryable": error.retryable,
        "details": {"n": 1},
    }


def test_defaults() -> None:
    error = D1SignerError("only text")
    assert (str(error), error.hint, error.retryable, error.details) == ("only text", "", False, {})
    details: dict[str, str | int | float] = {"a": 1}
    error = D1SignerError("text", details=details)
    details["a"] = 2
    assert error.details == {"a": 1}
    assert isinstance(errors.InvalidInputError("x"), ValueError)


def test_missing_extra_says_what_to_type() -> None:
    error = MissingExtraError.of("boto3", "aws")
    assert 'pip install "d1-signer[aws]"' in str(error)
    assert "boto3" in error.message
