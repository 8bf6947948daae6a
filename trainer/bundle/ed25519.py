"""Verification of Ed25519 signatures (RFC 8032, section 5.1.7) in plain Python.

Python's standard library has no Ed25519, and a host without a network has nothing else. Nothing here
handles a secret, so nothing needs to run in constant time; signatures are made by openssl.
A point is held as (X, Y, Z, T) with x = X/Z, y = Y/Z, x*y = T/Z.
"""

from __future__ import annotations

import hashlib

P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_ONE = pow(2, (P - 1) // 4, P)
KEY_BYTES, SIGNATURE_BYTES = 32, 64

Point = tuple[int, int, int, int]
NEUTRAL: Point = (0, 1, 1, 0)


def verify(key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` (64 bytes) is the one of `message` under the public `key` (32 bytes).

    Strict: a scalar or a coordinate beyond its modulus, and a key or commitment off the curve, are refused.
    """
    if len(key) != KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    commitment, scalar = signature[:32], int.from_bytes(signature[32:], "little")
    public, committed = _point(key), _point(commitment)
    if public is None or committed is None or scalar >= ORDER:
        return False
    digest = hashlib.sha512(commitment + key + message).digest()
    challenge = int.from_bytes(digest, "little") % ORDER
    return _equal(_times(scalar, _base()), _add(committed, _times(challenge, public)))


def _base() -> Point:
    found = _point((4 * pow(5, P - 2, P) % P).to_bytes(32, "little"))
    assert found is not None
    return found


def _point(data: bytes) -> Point | None:
    """The point that 32 bytes stand for; None where there is none."""
    number = int.from_bytes(data, "little")
    sign, y = number >> 255, number & ((1 << 255) - 1)
    if y >= P:
        return None
    x = _x(y, sign)
    return None if x is None else (x, y, 1, x * y % P)


def _x(y: int, sign: int) -> int | None:
    """The x of the curve -x² + y² = 1 + d x² y² whose lowest bit is `sign`."""
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    if square == 0:
        return None if sign else 0
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * ROOT_OF_MINUS_ONE % P
    if x * x % P != square:
        return None
    return P - x if x & 1 != sign else x


def _add(one: Point, other: Point) -> Point:
    a = (one[1] - one[0]) * (other[1] - other[0]) % P
    b = (one[1] + one[0]) * (other[1] + other[0]) % P
    c = 2 * one[3] * other[3] * D % P
    d = 2 * one[2] * other[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def _times(factor: int, point: Point) -> Point:
    result = NEUTRAL
    while factor:
        if factor & 1:
            result = _add(result, point)
        point = _add(point, point)
        factor >>= 1
    return result


def _equal(one: Point, other: Point) -> bool:
    return (one[0] * other[2] - other[0] * one[2]) % P == 0 and (
        one[1] * other[2] - other[1] * one[2]
    ) % P == 0
