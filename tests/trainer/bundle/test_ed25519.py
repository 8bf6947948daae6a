"""Our verification against RFC 8032's vectors, against openssl, and against signatures that must not hold."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from trainer.bundle import keys
from trainer.bundle.contents import SIGNATURE
from trainer.bundle.ed25519 import ORDER, P, verify

VECTORS = {  # RFC 8032, section 7.1: public key, message, signature
    "TEST 1": (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    "TEST 2": (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    "TEST 3": (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
    "TEST SHA(abc)": (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd"
        "454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e030"
        "3dca179c138ac17ad9bef1177331a704",
    ),
}


@pytest.fixture(params=VECTORS)
def vector(request: pytest.FixtureRequest) -> tuple[bytes, bytes, bytes]:
    public, message, signature = (bytes.fromhex(text) for text in VECTORS[request.param])
    return public, message, signature


def test_the_rfcs_signatures_hold(vector: tuple[bytes, bytes, bytes]) -> None:
    assert verify(*vector)


def test_another_message_key_or_signature_does_not_hold(vector: tuple[bytes, bytes, bytes]) -> None:
    public, message, signature = vector
    assert not verify(public, message + b"\0", signature)
    for place in (0, 31, 32, 63):
        changed = bytearray(signature)
        changed[place] ^= 1
        assert not verify(public, message, bytes(changed))
    assert not verify(bytes([public[0] ^ 1]) + public[1:], message, signature)


def test_a_second_form_of_the_same_signature_does_not_hold(vector: tuple[bytes, bytes, bytes]) -> None:
    """A scalar plus the group's order would pass a lax check: a signature could be changed unnoticed."""
    public, message, signature = vector
    scalar = int.from_bytes(signature[32:], "little") + ORDER
    assert not verify(public, message, signature[:32] + scalar.to_bytes(32, "little"))


def test_what_is_no_point_or_of_another_length_does_not_hold(vector: tuple[bytes, bytes, bytes]) -> None:
    public, message, signature = vector
    beyond, off_the_curve, minus_zero = P + 1, 2, 1 | 1 << 255
    for number in (beyond, off_the_curve, minus_zero):
        point = number.to_bytes(32, "little")
        assert not verify(point, message, signature)
        assert not verify(public, message, point + signature[32:])
    assert not verify(public[:31], message, signature)
    assert not verify(public, message, signature + b"\0")


def test_openssl_and_we_agree(tmp_path: Path, key: Path, trusted: bytes) -> None:
    source = random.Random(5)
    for size in (1, 63, 64, 1000):
        message = source.randbytes(size)
        keys.sign(tmp_path, key, message)
        signature = bytes.fromhex((tmp_path / SIGNATURE).read_text())
        assert verify(trusted, message, signature)
        assert not verify(trusted, message + b"x", signature)
