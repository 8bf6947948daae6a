"""What the figures amount to: one sentence, and whether distilling was worth it, criterion by criterion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.manifest import Manifest

MIN_EXAMPLES = 50
ACCEPTABLE = 0.85
"""Of the teacher's score, from which what is left of it is usually enough."""
MONTHLY_CALLS = 100_000
"""The volume from which an own model is usually worth its upkeep."""

STAND_IN = (
    "The teacher is a stand-in, not a real API model: these figures show that the loop works, "
    "not what your task will save."
)

State = Literal["yes", "partly", "no"]


@dataclass(frozen=True)
class Criterion:
    """One reason for or against, from measured numbers."""

    name: str
    state: State
    text: str


def sentence(manifest: Manifest, certificate: Mapping[str, Any]) -> str:
    """The verdict in one sentence.

    Args:
        certificate: certify/summary.json's `certificate`; its `reason` tells more of a refusal.
    """
    router = manifest.router
    if router.certified:
        what = f"the calls of {manifest.predictor}" if manifest.predictor else "requests"
        return (
            f"{percent(router.local_share)} of {what} are answered locally, with at least "
            f"{exact(router.keep)} of the teacher's score at {exact(router.confidence)} confidence."
        )
    nothing = "Nothing is answered locally yet"
    if examples := certificate.get("examples_missing"):
        return f"{nothing}: about {examples:,} more examples in the calibrate split are needed to prove it."
    if rows := certificate.get("rows_missing"):  # a certificate of before, which counts what certifies
        return f"{nothing}: about {rows:,} more calibration rows are needed to prove it."
    return f"{nothing}: no threshold could be certified."


def criteria(manifest: Manifest, spent_usd: float) -> list[Criterion]:
    """Quality, cost, latency, privacy, independence and data, each with a verdict.

    Args:
        spent_usd: what the teacher's traces have cost.
    """
    return [
        _quality(manifest),
        _cost(manifest, spent_usd),
        _latency(manifest),
        _privacy(manifest),
        _offline(manifest),
        _data(manifest),
    ]


def percent(share: float) -> str:
    """A measured share as whole percent, rounded down: 99.6 % is not shown as 100, and something not as nothing."""
    return "under 1 %" if 0 < share < 0.01 else f"{int(100 * share + 1e-9)} %"


def exact(share: float) -> str:
    """A share that was set, such as 0.95 or 0.995, as percent."""
    return f"{round(100 * share, 6):g} %"


def _quality(manifest: Manifest) -> Criterion:
    """Of what is served: with a certificate the hybrid, else the student that would answer alone."""
    router, scores = manifest.router, manifest.scores
    served = "hybrid" if router.certified else "student"
    kept = scores[served].mean / scores["teacher"].mean if scores["teacher"].mean else 1.0
    usual = f"from {exact(ACCEPTABLE)} on is usually acceptable"
    if not router.certified:
        text = f"alone, the student keeps {percent(kept)} of the teacher's score ({usual}); without a certificate"
        return Criterion("Quality", "partly" if kept >= ACCEPTABLE else "no", text)
    return Criterion(
        "Quality",
        "yes" if kept >= ACCEPTABLE else "partly",
        f"behind the router {percent(kept)} of the teacher's score is kept ({usual}); "
        f"at least {exact(router.keep)} is certified",
    )


def _cost(manifest: Manifest, spent_usd: float) -> Criterion:
    teacher, hybrid = (manifest.cost_per_1k_usd[name] for name in ("teacher", "hybrid"))
    saved = teacher - hybrid
    if saved <= 0:
        return Criterion("Cost", "no", f"no API cost is saved; the teacher's traces cost ${spent_usd:,.2f}")
    requests = 1000 * spent_usd / saved
    monthly = saved * MONTHLY_CALLS / 1000
    return Criterion(
        "Cost",
        "yes",
        f"saves ${saved:,.2f} of API cost per 1,000 requests (${monthly:,.0f} a month at {MONTHLY_CALLS:,} "
        f"requests); the traces' ${spent_usd:,.2f} are back after {requests:,.0f} requests",
    )


def _latency(manifest: Manifest) -> Criterion:
    teacher, local = (manifest.latency_ms[name].p50 for name in ("teacher", "local"))
    state: State = "yes" if local < teacher else "no"
    word = "faster" if local < teacher else "slower"
    return Criterion(
        "Latency",
        state,
        f"half of the local answers take up to {local:,.0f} ms, the teacher's {teacher:,.0f} ms: {word}",
    )


def _privacy(manifest: Manifest) -> Criterion:
    if manifest.predictor:
        return Criterion("Privacy", "no", "the program's other predictors tell the teacher of every request")
    share = manifest.router.local_share
    return Criterion(
        "Privacy",
        _of(share),
        f"{percent(share)} of the test's requests never leave the machine; offline mode: all of them",
    )


def _offline(manifest: Manifest) -> Criterion:
    if manifest.predictor:
        return Criterion("Independence", "no", "the program's other predictors need the API")
    share = manifest.router.local_share
    return Criterion(
        "Independence",
        _of(share),
        f"without the API {percent(share)} of the test's requests are answered as certified, the others locally "
        "without a guarantee",
    )


def _of(share: float) -> State:
    return "yes" if share >= 1 else "partly" if share > 0 else "no"


def _data(manifest: Manifest) -> Criterion:
    count = manifest.data.train
    state: State = "yes" if count >= MIN_EXAMPLES else "no"
    return Criterion(
        "Data", state, f"trained on {count:,} examples; below {MIN_EXAMPLES} distilling is not worth trying"
    )
