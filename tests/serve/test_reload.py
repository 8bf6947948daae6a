"""Releases that change while the endpoint runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import EmbeddedError
from serve.release import Release, current
from serve.tasks import RETRY_S, Tasks
from serve.upstreams.local import LocalModel
from tests.serve.endpoint_support import (
    SURE,
    hybrid,
    local_model,
    question,
    teacher_model,
    told,
)
from tests.serve.release_support import point, write_release


class TestReleases:
    def test_a_new_current_is_taken_up_and_rolled_back_without_a_dropped_request(
        self, tmp_path: Path
    ) -> None:
        releases = tmp_path / "releases"
        first = write_release(releases)
        second = write_release(releases, stamp="20261121T000000Z", gguf=b"another model", current=False)
        with hybrid(tmp_path, local_model(SURE), None) as served:
            seen = [told(served.ask(question()))["release"]]
            for version in (second, first):
                point(releases, version)
                while seen[-1] != version:
                    response = served.ask(question())
                    assert response.status_code == 200
                    seen.append(told(response)["release"])
        assert list(dict.fromkeys(seen)) == [first, second]

    def test_the_first_release_is_taken_up_while_running(self, tmp_path: Path) -> None:
        with hybrid(tmp_path, local_model(SURE), teacher_model()) as served:
            assert told(served.ask(question()))["reason"] == "no_release"
            write_release(tmp_path / "releases")
            reasons = {"no_release"}
            while "confident" not in reasons:
                reasons.add(told(served.ask(question()))["reason"])
        assert reasons == {"no_release", "confident"}

    def test_an_altered_model_is_refused(self, tmp_path: Path) -> None:
        version = write_release(tmp_path / "releases")
        (tmp_path / "releases" / "tickets" / version / "model.gguf").write_bytes(b"something else")
        local = local_model()
        with hybrid(tmp_path, local, teacher_model()) as served:
            headers = told(served.ask(question()))
            health = served.client.get("/healthz").json()
        assert (headers["route"], headers["reason"]) == ("teacher", "no_release")
        assert "SHA-256" in health["tasks"]["tickets"]["problem"]
        assert local.asked == []

    def test_another_runtime_than_the_certified_one_is_refused(self, tmp_path: Path) -> None:
        write_release(tmp_path / "releases", runtime="ollama")
        local, teacher = local_model(), teacher_model()
        with hybrid(tmp_path, local, teacher) as served:
            headers = told(served.ask(question()))
            health = served.client.get("/healthz").json()
        assert (headers["route"], headers["reason"]) == ("teacher", "no_release")
        assert teacher.asked[0]["model"] == "gpt-4o"
        assert 'binds runtime "ollama"' in health["tasks"]["tickets"]["problem"]
        assert local.asked == []

    def test_a_broken_successor_leaves_the_release_before_it_in_use(self, tmp_path: Path) -> None:
        releases = tmp_path / "releases"
        first = write_release(releases)
        with hybrid(tmp_path, local_model(SURE), teacher_model()) as served:
            second = write_release(releases, stamp="20261121T000000Z", gguf=b"x", current=False)
            (releases / "tickets" / second / "model.gguf").write_bytes(b"y")
            point(releases, second)
            while "problem" not in (health := served.client.get("/healthz").json()["tasks"]["tickets"]):
                pass
            assert health["release"] == first
            assert told(served.ask(question()))["release"] == first


@pytest.mark.asyncio
@pytest.mark.parametrize(("certified_for", "reads"), [("ollama", 1), ("url", 2)])
async def test_only_what_time_can_mend_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certified_for: str, reads: int
) -> None:
    write_release(tmp_path, runtime=certified_for)
    now, read = 0.0, []

    def load(folder: Path) -> Release | None:
        read.append(folder)
        return current(folder)

    class Broken:
        async def start(self, release: Release) -> LocalModel:
            raise EmbeddedError("it does not start")

    monkeypatch.setattr("serve.tasks.releases.current", load)
    tasks = Tasks(tmp_path, "url", Broken(), None, clock=lambda: now)
    await tasks.refresh()
    now = RETRY_S
    await tasks.refresh()
    assert len(read) == reads
    assert tasks.problems["tickets"]
    write_release(tmp_path, runtime=certified_for, stamp="20261121T000000Z")
    await tasks.refresh()
    assert len(read) == reads + 1
