"""The key that bundles are signed with: made and used by openssl, which keeps its operations in constant time.

The file holds the private key (PKCS #8, PEM, mode 0600); `<file>.pub` beside it holds the public one as 64
hex digits, which is short enough to be read out on the telephone.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from trainer import process
from trainer.bundle.contents import CHECKSUMS, SIGNATURE
from trainer.bundle.ed25519 import KEY_BYTES, SIGNATURE_BYTES, verify
from trainer.errors import BundleError

TIMEOUT_S = 60.0
DER_PREFIX = bytes.fromhex("302a300506032b6570032100")
"""What stands before the 32 bytes of an Ed25519 key in a SubjectPublicKeyInfo (RFC 8410)."""


def make_if_missing(key: Path) -> bool:
    """Make the key pair; False where there is one.

    Raises:
        BundleError: openssl is missing, or the key can be read by others.
    """
    if key.exists():
        if key.stat().st_mode & 0o077:
            raise BundleError([f"{key} can be read by others; run: chmod 600 {key}"])
        return False
    key.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=key.parent, prefix=".key-") as folder:  # made with mode 0700
        made = Path(folder) / "key"
        _openssl("genpkey", "-algorithm", "ed25519", "-out", made)
        made.chmod(0o600)
        durable(key.with_name(f"{key.name}.pub"), f"{public(made).hex()}\n".encode())
        os.replace(made, key)  # last: where there is a key, nothing is made any more
    return True


def public(key: Path) -> bytes:
    """The public key, 32 bytes.

    Raises:
        BundleError: the file holds no Ed25519 key.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "public"
        _openssl("pkey", "-in", key, "-pubout", "-outform", "DER", "-out", out)
        der = out.read_bytes()
    if not der.startswith(DER_PREFIX) or len(der) != len(DER_PREFIX) + KEY_BYTES:
        raise BundleError([f"{key} is no Ed25519 key; name another file, it is made where it is missing"])
    return der[len(DER_PREFIX) :]


def sign(folder: Path, key: Path, data: bytes) -> None:
    """Write checksums.sig and then checksums.json: only both together make a bundle.

    Raises:
        BundleError: openssl fails, or its signature does not hold.
    """
    with tempfile.TemporaryDirectory() as work:
        message, out = Path(work) / "message", Path(work) / "signature"
        message.write_bytes(data)
        _openssl("pkeyutl", "-sign", "-rawin", "-inkey", key, "-in", message, "-out", out)
        signature = out.read_bytes()
    if len(signature) != SIGNATURE_BYTES or not verify(public(key), data, signature):
        raise BundleError([f"the signature that openssl made with {key} does not hold; try another openssl"])
    durable(folder / SIGNATURE, f"{signature.hex()}\n".encode())
    durable(folder / CHECKSUMS, data)


def durable(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _openssl(*args: str | Path) -> None:
    try:
        done = process.run(["openssl", *args], timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise BundleError(
            ["openssl is not installed, which keys and signatures are made with; install it"]
        ) from None
    if done.code:
        raise BundleError(
            [f"openssl {args[0]} failed ({done.last_line}); it takes openssl 3 and an Ed25519 key"]
        )
