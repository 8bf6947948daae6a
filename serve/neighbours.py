"""How far a query is from what the student was trained on: hashed n-gram vectors and cosine distance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIMENSIONS = 512
MOST = 2_000
"""Training inputs that are kept; more are thinned out evenly."""
NEAREST = 5
MAX_BYTES = 8_192
"""Of a query; what lies behind does not change the distance and must not cost time."""
SIZES = (3, 4)


class Neighbours:
    """Unit vectors of the training inputs, shape (n, DIMENSIONS), float32."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != DIMENSIONS:
            raise ValueError(f"neighbours have shape {vectors.shape}, not (n, {DIMENSIONS}); certify again")
        self._vectors = vectors

    @classmethod
    def build(cls, queries: Sequence[str]) -> Neighbours:
        """From training queries; above MOST an evenly spaced part of them."""
        step = max(1, -(-len(queries) // MOST))
        kept = [vector(query) for query in queries[::step]]
        return cls(np.array(kept, dtype=np.float32).reshape(-1, DIMENSIONS))

    @classmethod
    def load(cls, path: Path) -> Neighbours:
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["vectors"].astype(np.float32))

    def save(self, path: Path) -> None:
        """Write float16 vectors as npz."""
        np.savez_compressed(path, vectors=self._vectors.astype(np.float16))

    def __len__(self) -> int:
        return len(self._vectors)

    def distance(self, query: str) -> tuple[float, float]:
        """Cosine distance (0 the same, 1 nothing in common) to the nearest, and mean of the 5 nearest."""
        nearest = self.nearest(query, NEAREST)[0]
        return (float(nearest[0]), float(nearest.mean())) if len(nearest) else (1.0, 1.0)

    def nearest(self, query: str, count: int) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """Distances, ascending, and row numbers of the `count` nearest (fewer where there are fewer)."""
        # einsum, not BLAS: its threads cost 10 ms here as soon as the model's own threads fill the cores
        distances = np.clip(1 - np.einsum("ij,j->i", self._vectors, vector(query)), 0, 1)
        count = min(count, len(distances))
        rows = np.argpartition(distances, count - 1)[:count] if count else np.empty(0, dtype=np.intp)
        order = rows[np.argsort(distances[rows], kind="stable")]
        return distances[order], order


def vector(text: str) -> NDArray[np.float32]:
    """Unit vector, shape (DIMENSIONS,), of the signed counts of byte 3- and 4-grams.

    The bytes of an n-gram are its code, mixed by the finaliser of MurmurHash3: the same on every machine.
    An empty text has the zero vector, at distance 1 from everything.
    """
    data = np.frombuffer(f" {' '.join(text.casefold().split())} ".encode()[:MAX_BYTES], dtype=np.uint8)
    codes = np.concatenate([_codes(data.astype(np.uint32), size) for size in SIZES])
    mixed = _mix(codes)
    signs = np.where(mixed & np.uint32(1), 1.0, -1.0)
    counts = np.bincount((mixed >> np.uint32(1)) % np.uint32(DIMENSIONS), weights=signs, minlength=DIMENSIONS)
    length = float(np.linalg.norm(counts))
    return np.asarray(counts / length if length else counts, dtype=np.float32)


def _codes(data: NDArray[np.uint32], size: int) -> NDArray[np.uint32]:
    count = max(0, len(data) - size + 1)
    codes = np.full(count, np.uint32(size), dtype=np.uint32)
    for offset in range(size):
        codes = codes ^ (data[offset : offset + count] << np.uint32(8 * offset))
    return codes


def _mix(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    codes = (codes ^ (codes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    codes = (codes ^ (codes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return codes ^ (codes >> np.uint32(16))
