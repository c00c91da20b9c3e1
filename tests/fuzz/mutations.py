# SPDX-License-Identifier: Apache-2.0
"""Foreign bytes: good samples with bits turned, bytes cut, doubled, swapped; and any bytes."""

from __future__ import annotations

from hypothesis import strategies as st

_WORDS = [b"\x00", b"\xff", b"\x80", b"\x30\x80", b'"', b"{", b"}", b"%", b"%00", b"\xef\xbb\xbf"]
_WORDS += [b"null", b"NaN", b"1e999", b"\\ud800", b"?", b"&", b"=", b";", b"#", b"\n", b"\r\n"]


@st.composite
def mutated(draw: st.DrawFn, *samples: bytes) -> bytes:
    """A sample with one to six changes, or now and then bytes of no sample."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.sampled_from([1, 1, 2, 4, 8, 32])))
        kind = draw(st.integers(0, 6))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1 and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:at] = draw(st.sampled_from(_WORDS))
        elif kind == 5:
            part = data[at:end]
            del data[at:end]
            to = draw(st.integers(0, len(data)))
            data[to:to] = part
        else:
            del data[at:]
    return bytes(data)
