"""Audits and what they say of drift, put together with the router that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from serve.records.audits import Audits, Kept, Said, Skipped
from serve.records.drift import Drift, Drifts
from serve.records.entry import Entry
from serve.records.journal import Journal
from serve.release import Release
from serve.routing.call import Call
from serve.routing.router import Router
from serve.routing.teaching import Withheld
from serve.tasks import Tasks
from serve.watching import gauges


class Auditing:
    """Draws from the answers that were kept, and follows every release that is audited.

    Args:
        record: told of every audit.
        random: draws.
    """

    def __init__(
        self, router: Router, journal: Journal, record: Callable[[Entry], None], random: Random | None = None
    ) -> None:
        self._router = router
        self._drifts = Drifts(journal.audits)
        self.audits = Audits(record, self._drifts, random or Random())

    def kept(self, call: Call, entry: Entry) -> None:
        """A local answer was given to a client as good."""
        served, question = call.served, call.question
        if entry.guarantee == "none" or not served or not question or not call.local_answer:
            return  # the drift is that of what was promised
        if not self.audits.draw(call.rules.audit):
            return
        text = call.local_answer["choices"][0]["message"].get("content") or ""
        fields = served.fields[question.predictor.name]
        self.audits.offer(Kept(entry, served.release, fields, text, lambda: self._asked(call)))

    async def follow(self, release: Release) -> None:
        """Take up what earlier audits of a release have found."""
        await self._drifts.follow(release)

    def drift(self, tasks: Tasks) -> Mapping[str, gauges.Drift]:
        """What is known of the releases in use, by task."""
        found = {}
        for name, served in tasks.served.items():
            # A release that came while we run is followed from its first audit on: until then nothing is known.
            drift = self._drifts.of(name, served.release.version) or Drift(served.release.router.audit)
            low, high = drift.interval() or (None, None)
            found[name] = gauges.Drift(drift.alarm, drift.audits, drift.estimate, low, high, drift.allowed)
        return found

    async def _asked(self, call: Call) -> Said:
        """The teacher's answer to the same request, whole, within the same rules.

        Raises:
            Skipped: the rules or the budget forbid it, or there is no teacher.
            UpstreamError.
        """
        try:
            answer, cost, attempts = await self._router.second_opinion(call)
        except Withheld as error:
            raise Skipped(error.reason, str(error)) from error
        return Said(answer, cost, attempts)
