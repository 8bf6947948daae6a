"""The commands as people give them: from one home to another, and back."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from serve.records.journal import Journal
from tests.finished import finished_run
from tests.trainer.bundle.test_carry import ENTRY, TRACE
from trainer import release
from trainer.bundle_cli import add_to as add_bundle
from trainer.errors import BundleError
from trainer.keeping_cli import add_to as add_keeping
from trainer.runs import Home
from trainer.traces import MIGRATIONS, Store


def call(home: Path, *arguments: str | Path) -> Result:
    app = typer.Typer()
    add_bundle(app)
    add_keeping(app)
    return CliRunner().invoke(app, [str(each) for each in arguments], env={"HOMESTILL_HOME": str(home)})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    run = finished_run(root, train=6, calibrate=12, test=8, student={"base": "base"})
    release.run(run)
    run.store.close()
    (root / "words" / "base").mkdir()
    return root


def test_there_and_back_again(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "source")
    home, task, key = tmp_path / "source" / "home", tmp_path / "source" / "words", tmp_path / "box.key"
    there, box, out = tmp_path / "there", tmp_path / "box", tmp_path / "out"
    written = call(home, "bundle", box, "--task", task, "--key", key, "--part-size", "0.00001")
    public = Path(f"{key}.pub").read_text().strip()
    assert written.exit_code == 0, written.output
    assert public in written.output
    assert call(home, "verify", box, "--trust", public).exit_code == 0
    loaded = call(there, "load", box, "--trust", f"{key}.pub", "--no-images")
    assert loaded.exit_code == 0, loaded.output
    assert (there / "releases/words/current").read_bytes() == (home / "releases/words/current").read_bytes()

    with closing(Store.open(Home(there).database_url)) as store:
        store.add_trace(TRACE)
    with closing(Journal(f"sqlite:///{there / 'journal.db'}")) as journal:
        journal.record(replace(ENTRY, id="served there"))
    exported = call(there, "export-traces", out, "--task", there / "tasks/words", "--key", key)
    assert exported.exit_code == 0, exported.output
    refused = call(home, "load", out, "--trust", public)
    assert refused.exit_code == 1  # an export is no bundle
    for took in ("took 1 of 1 traces, 0 of 20 answers, 1 of 1 requests", "took 0 of 1 traces"):
        imported = call(home, "import-traces", out, "--trust", public)
        assert took in imported.output.replace("\n", " "), imported.output
    with closing(Store.open(Home(home).database_url)) as store:
        assert store.trace(TRACE.id) == TRACE
    with closing(Journal(f"sqlite:///{home / 'journal.db'}")) as journal:
        assert journal.find("served there") is not None


def test_a_home_without_traces_exports_nothing(made: Path, tmp_path: Path) -> None:
    found = call(
        tmp_path / "none",
        "export-traces",
        tmp_path / "out",
        "--task",
        made / "words",
        "--key",
        tmp_path / "k",
    )
    assert isinstance(found.exception, BundleError)
    assert not (tmp_path / "out").exists()


def test_backup_upgrade_prune_and_restore(made: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(made / "home", home)
    assert "files" in call(home, "backup", tmp_path / "backup").output
    upgraded = call(home, "upgrade")
    assert (upgraded.exit_code, f"homestill.db: schema {len(MIGRATIONS)}" in upgraded.output) == (0, True)
    before = sorted(home.rglob("*"))
    assert "would be freed" in call(home, "prune", "--keep", "0", "--days", "0").output
    assert sorted(home.rglob("*")) == before
    assert "freed" in call(home, "prune", "--yes").output
    (home / "releases" / "words" / "current").unlink()
    assert isinstance(call(home, "restore", tmp_path / "backup").exception, BundleError)
    assert call(home, "restore", tmp_path / "backup", "--force").exit_code == 0
    assert (home / "releases" / "words" / "current").is_file()
    next(home.glob("releases/words/*/router.json")).write_text("{}")
    assert call(home, "upgrade").exit_code == 1
