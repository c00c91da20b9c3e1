# SPDX-License-Identifier: Apache-2.0
"""Which fault applies to the next requests."""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d1_signer.errors import InvalidInputError
from d1_signer.sandbox.faults import FAULTS
from d1_signer.sandbox.records import Fault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web

    from d1_signer.sandbox.faults import Call


@dataclass(frozen=True, slots=True)
class Order:
    """One fault with its parameters, to be applied to one request."""

    fault: Fault
    parameters: Mapping[str, object]

    async def apply(self, call: Call) -> web.StreamResponse | None:
        """The response to send, or None to close the connection."""
        return await FAULTS[self.fault](call, **self.parameters)


class Plan:
    """The orders for one endpoint; set by any thread, taken by the server's.

    Args:
        unfit: Faults that mean nothing at this endpoint.
    """

    def __init__(self, unfit: frozenset[Fault] = frozenset()) -> None:
        self._lock = threading.Lock()
        self._unfit = unfit
        self._fault: Fault | None = None
        self._left: int | None = None
        self._parameters: Mapping[str, object] = {}

    def order(
        self, fault: Fault | str | None, *, times: int | None, parameters: Mapping[str, object]
    ) -> None:
        """Replace the orders; None for `fault` ends the misbehaviour.

        Args:
            fault: The fault, or its value.
            times: For how many requests from now; None until the next order.
            parameters: Those of the fault, see `Fault`.

        Raises:
            InvalidInputError: No such fault here, no such parameter, or a wrong type of value.
        """
        if fault is not None:
            fault = self._known(fault)
            _check_parameters(fault, parameters)
        if times is not None and (type(times) is not int or times < 1):
            raise InvalidInputError("`times` is None or a whole number of at least 1.")
        with self._lock:
            self._fault, self._left, self._parameters = fault, times, dict(parameters)

    def take(self) -> Order | None:
        """The order for one request that has arrived, None where it is to be answered honestly."""
        with self._lock:
            if self._fault is None:
                return None
            order = Order(self._fault, self._parameters)
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    self._fault = None
            return order

    def _known(self, fault: str) -> Fault:
        try:
            known = Fault(fault)
        except ValueError:
            raise InvalidInputError(
                f"There is no fault {fault!r}.", hint=f"Faults: {', '.join(Fault)}."
            ) from None
        if known in self._unfit:
            raise InvalidInputError(f"The fault {known.value} concerns the token endpoint only.")
        return known


def _check_parameters(fault: Fault, parameters: Mapping[str, object]) -> None:
    signature = inspect.signature(FAULTS[fault], eval_str=True)
    types = {
        p.name: p.annotation for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    for name, value in parameters.items():
        if name not in types:
            raise InvalidInputError(
                f"The fault {fault.value} has no parameter {name!r}.",
                hint=f"Parameters: {', '.join(types) or 'none'}.",
            )
        # PEP 484: an int does where a float is asked for.
        candidates = (value, float(value)) if type(value) is int else (value,)
        if not any(isinstance(candidate, types[name]) for candidate in candidates):
            raise InvalidInputError(f"The parameter {name} of {fault.value} has a wrong type.")
