"""Installing and upgrading: verified first, repeatable, what is newer stays, what is in use changes last."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.trainer.bundle.samples import CREATED, FILES, VERSION, write_bundle
from trainer.bundle.__main__ import main
from trainer.bundle.contents import BUNDLE
from trainer.bundle.gather import tool
from trainer.bundle.load import Host, load
from trainer.bundle.verify import check
from trainer.errors import BundleError, BusyError

LATER = "20261122T000000Z-00000000"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "home", tmp_path / "home" / "tasks", tmp_path / "hub")


@pytest.fixture
def bundle(tmp_path: Path, key: Path) -> Path:
    write_bundle(tmp_path / "bundle", key)
    return tmp_path / "bundle"


def _load(bundle: Path, trusted: bytes, host: Host, *, force: bool = False) -> str:
    said: list[str] = []
    load(bundle, check(bundle, BUNDLE, trusted), host, said.append, force=force)
    return "\n".join(said)


def _installed(host: Host) -> dict[str, bytes]:
    kept = {".load.lock", "bundle.json"}
    return {
        path.relative_to(host.home.parent).as_posix(): path.read_bytes()
        for path in host.home.parent.rglob("*")
        if path.is_file() and path.name not in kept and "bundle/" not in path.as_posix()
    }


def test_everything_lands_where_it_is_looked_for(bundle: Path, trusted: bytes, host: Host) -> None:
    _load(bundle, trusted, host)
    expected = {f"home/{path}": data for path, data in FILES.items() if not path.startswith("bases/")} | {
        "home/releases/words/current": f"{VERSION}\n".encode(),
        "hub/models--org--small/snapshots/0123abcd/config.json": b"{}\n",
        "hub/models--org--small/refs/main": b"0123abcd",
    }
    assert _installed(host) == expected
    assert host.home.stat().st_mode & 0o077 == 0


def test_loading_again_changes_nothing(bundle: Path, trusted: bytes, host: Host) -> None:
    _load(bundle, trusted, host)
    before = _installed(host)
    inodes = {path: path.stat().st_ino for path in host.home.glob("releases/*/*/*")}
    said = _load(bundle, trusted, host)
    assert _installed(host) == before
    assert {path: path.stat().st_ino for path in inodes} == inodes
    assert f"release words {VERSION}: is there" in said


def test_a_changed_bundle_installs_nothing(bundle: Path, trusted: bytes, host: Host) -> None:
    (bundle / "legal/NOTICE.txt").write_text("x")
    command = ["load", str(bundle), "--trust", trusted.hex(), "--home", str(host.home), "--no-images"]
    assert main(command, {}) == 1
    assert not host.home.exists()


def test_a_damaged_release_is_replaced_and_the_damaged_one_kept(
    bundle: Path, trusted: bytes, host: Host
) -> None:
    _load(bundle, trusted, host)
    model = host.home / "releases/words" / VERSION / "model.gguf"
    model.write_bytes(b"broken")
    _load(bundle, trusted, host)
    assert model.read_bytes() == FILES[f"releases/words/{VERSION}/model.gguf"]
    assert (host.home / f"releases/words/.{VERSION}.damaged/model.gguf").read_bytes() == b"broken"


def test_what_a_killed_load_left_is_cleared_away(bundle: Path, trusted: bytes, host: Host) -> None:
    partial = host.home / f"releases/words/.{VERSION}.loading"
    partial.mkdir(parents=True)
    (partial / "stray").touch()
    _load(bundle, trusted, host)
    assert not partial.exists()
    assert not (host.home / "releases/words" / VERSION / "stray").exists()


def test_a_newer_current_release_stays_without_force(bundle: Path, trusted: bytes, host: Host) -> None:
    current = host.home / "releases/words/current"
    current.parent.mkdir(parents=True)
    current.write_text(LATER)
    assert "stays current" in _load(bundle, trusted, host)
    assert current.read_text() == LATER
    assert (host.home / "releases/words" / VERSION).is_dir()
    _load(bundle, trusted, host, force=True)
    assert current.read_text().strip() == VERSION


def test_an_older_bundle_is_refused_without_force(
    bundle: Path, tmp_path: Path, key: Path, trusted: bytes, host: Host
) -> None:
    _load(bundle, trusted, host)
    older = tmp_path / "older"
    write_bundle(older, key, created="20200101T000000Z")
    with pytest.raises(BundleError, match=f"one of {CREATED} was loaded"):
        _load(older, trusted, host)
    _load(older, trusted, host, force=True)


def test_a_task_that_was_edited_here_is_kept_beside(bundle: Path, trusted: bytes, host: Host) -> None:
    _load(bundle, trusted, host)
    (host.tasks / "words/task.yaml").write_text("name: mine\n")
    (host.tasks / "words/extra.py").touch()
    _load(bundle, trusted, host)
    assert (host.tasks / "words/task.yaml").read_bytes() == FILES["tasks/words/task.yaml"]
    assert not (host.tasks / "words/extra.py").exists()
    assert (host.tasks / ".load/before/words/task.yaml").read_text() == "name: mine\n"


def test_images_go_to_the_engine(tmp_path: Path, key: Path, trusted: bytes, host: Host) -> None:
    image = bytes(range(256)) * 30
    write_bundle(tmp_path / "images", key, {"images/serve-0123.tar": image})
    engine = tmp_path / "docker"
    engine.write_text(f'#!/bin/sh\n[ "$1" = load ] && cat > {tmp_path}/loaded && echo Loaded image: serve\n')
    engine.chmod(0o755)
    with_engine = Host(host.home, host.tasks, host.hub, docker=str(engine))
    assert "Loaded image: serve" in _load(tmp_path / "images", trusted, with_engine)
    assert (tmp_path / "loaded").read_bytes() == image
    engine.write_text("#!/bin/sh\nexec 0<&-\necho no space left\nexit 3\n")
    with pytest.raises(BundleError, match="no space left"):
        _load(tmp_path / "images", trusted, with_engine)
    assert "stay in the bundle" in _load(tmp_path / "images", trusted, host)


def test_an_image_that_changed_meanwhile_is_not_ended_for_the_engine(
    tmp_path: Path, key: Path, trusted: bytes, host: Host
) -> None:
    write_bundle(tmp_path / "images", key, {"images/serve-0123.tar": b"image"})
    contents = check(tmp_path / "images", BUNDLE, trusted)
    (tmp_path / "images/images/serve-0123.tar").write_bytes(b"Image")
    engine = tmp_path / "docker"
    engine.write_text(f"#!/bin/sh\ncat >{tmp_path}/loaded && touch {tmp_path}/ended\n")
    engine.chmod(0o755)
    with pytest.raises(BundleError, match="has changed since"):
        load(tmp_path / "images", contents, replace(host, docker=str(engine)), lambda _: None)
    assert not (tmp_path / "ended").exists()


def test_a_host_with_docker_gets_images_and_compose_files_first(
    tmp_path: Path, key: Path, trusted: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b"
    write_bundle(bundle, key, {**FILES, "box/compose.yaml": b"name: x\n", "box/docker/cpu.yaml": b"{}\n"})
    options = ["--trust", trusted.hex(), "--box", str(tmp_path / "box"), "--no-images"]
    assert main(["load", str(bundle), *options], {"HOMESTILL_HOME": str(tmp_path / "home")}) == 0
    assert (tmp_path / "box/compose.yaml").read_bytes() == b"name: x\n"
    assert (tmp_path / "box/docker/cpu.yaml").is_file()
    assert (tmp_path / "box/tasks/words/task.yaml").read_bytes() == FILES["tasks/words/task.yaml"]
    assert not (tmp_path / "home").exists()
    assert f"trainer load /bundle --trust {trusted.hex()}" in capsys.readouterr().out


def test_a_box_keeps_what_was_edited_and_takes_nothing_older(
    tmp_path: Path, key: Path, trusted: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    box, options = tmp_path / "box", ["--trust", trusted.hex(), "--box", str(tmp_path / "box"), "--no-images"]
    for created in ("20260101T000000Z", "20260301T000000Z", "20260201T000000Z"):
        files = {"box/compose.yaml": f"name: x{created}\n".encode(), "box/docker/cpu.yaml": b"{}\n"}
        write_bundle(tmp_path / created, key, files, created=created)
    assert main(["load", str(tmp_path / "20260101T000000Z"), *options], {}) == 0
    (box / "compose.yaml").write_text("name: mine\n")
    for _ in range(2):
        assert main(["load", str(tmp_path / "20260301T000000Z"), *options], {}) == 0
        assert (box / "compose.yaml").read_text() == "name: x20260301T000000Z\n"
        assert (box / "compose.yaml.before").read_text() == "name: mine\n"
    assert "compose.yaml: replaced, the former one is kept in compose.yaml.before" in capsys.readouterr().out
    assert not (box / "docker/cpu.yaml.before").exists()

    assert main(["load", str(tmp_path / "20260201T000000Z"), *options], {}) == 1
    assert "one of 20260301T000000Z was loaded already" in capsys.readouterr().err
    assert (box / "compose.yaml").read_text() == "name: x20260301T000000Z\n"
    assert main(["load", str(tmp_path / "20260201T000000Z"), *options, "--force"], {}) == 0
    assert (box / "compose.yaml").read_text() == "name: x20260201T000000Z\n"


def test_two_loads_at_once_are_refused(bundle: Path, trusted: bytes, host: Host) -> None:
    import fcntl

    host.home.mkdir()
    with open(host.home / ".load.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError):
            _load(bundle, trusted, host)


def test_the_tool_in_the_bundle_needs_plain_python_alone(tmp_path: Path, key: Path, trusted: bytes) -> None:
    bundle, home = tmp_path / "b", tmp_path / "home"
    write_bundle(bundle, key, {**FILES, "tool.pyz": tool()}, part_bytes=10**6)
    assert tool() == tool()
    plain = [str(Path(sys.base_prefix) / "bin" / "python3"), "-I", "-S", str(bundle / "tool.pyz")]
    environment = {"PATH": os.defpath, "HOME": str(tmp_path)}
    for action in ("verify", "load"):
        options = ["--home", str(home), "--no-images"] if action == "load" else []
        done = subprocess.run(
            [*plain, action, "--trust", trusted.hex(), *options],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert (home / "releases/words/current").read_text().strip() == VERSION
    check(bundle, BUNDLE, trusted)  # running it from there has left nothing behind


def test_the_tool_is_written_in_the_python_that_it_promises() -> None:
    with zipfile.ZipFile(io.BytesIO(tool())) as archive:
        assert "trainer/bundle/verify.py" in archive.namelist()
        for name in archive.namelist():
            ast.parse(archive.read(name), name, feature_version=(3, 9))
