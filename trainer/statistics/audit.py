"""What audits of the served answers are held against: how often kept local answers differ from the teacher's.

The fields are chosen on the fit rows and the rate is counted on the test rows. The threshold was chosen on the
calibrate rows as the laxest that passes, so the answers that it keeps there look better than they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.confidence import Field, agreement
from trainer.statistics.certificate import upper_bound

Pair = tuple[str, str]
"""A kept local answer and the teacher's to the same example."""
DELTA = 0.025
"""Probability that the rate is larger than its bound."""


def baseline(
    chosen_on: Sequence[Pair], counted_on: Sequence[Pair], fields: Sequence[Field]
) -> dict[str, Any]:
    """The "audit" of router.json: fields, kept, disagreed, and the Clopper–Pearson upper bound on the rate."""
    alike = worded_alike(chosen_on, fields)
    disagreed = sum(agreement(mine, its, alike) < 1 for mine, its in counted_on)
    return {
        "fields": [field.name for field in alike],
        "kept": len(counted_on),
        "disagreed": disagreed,
        "upper": float(upper_bound(disagreed, len(counted_on), DELTA)),
    }


def worded_alike(pairs: Sequence[Pair], fields: Sequence[Field]) -> list[Field]:
    """The fields in which at least half of the answers agree; all where none is.

    Free text, such as the reasoning before an answer, hardly ever is the same twice: compared, it would hide
    every change of what matters.
    """
    alike = [field for field in fields if 2 * sum(agreement(*pair, [field]) for pair in pairs) >= len(pairs)]
    return alike or list(fields)
