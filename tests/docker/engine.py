"""The Docker Engine for tests: commands as argument lists, images over a base that is at hand."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, cast

ROOT = Path(__file__).resolve().parents[2]
BASE = "stand-in/python:3.11"
BUILD_BASE = "homestill-test/build-base"
SERVE, TRAINER, STANDIN = "homestill/serve:test", "homestill/trainer:test", "homestill-test/stand-in"
BUILD_S = 1800
GZIP = b"\x1f\x8b"


def docker(
    *words: str | Path,
    timeout: float = 120,
    check: bool = True,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:
    """Run docker; what it wrote to standard output. AssertionError with all it said where it fails."""
    command = ["docker", *map(str, words)]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=folder)
    assert done.returncode == 0 or not check, (
        f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout.strip()


def missing() -> str:
    """Why images cannot be built here; empty where they can."""
    if shutil.which("docker") is None:
        return "no docker command here"
    if subprocess.run(["docker", "info"], capture_output=True, timeout=30).returncode:
        return "no Docker Engine answers"
    if subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30).returncode:
        return "no docker compose here"
    base = base_image()
    if subprocess.run(["docker", "image", "inspect", base], capture_output=True, timeout=30).returncode:
        return f"no base image {base}; name one in HOMESTILL_TEST_BASE_IMAGE"
    return ""


def base_image() -> str:
    return os.environ.get("HOMESTILL_TEST_BASE_IMAGE") or BASE


def build(target: str, tag: str, *arguments: str, context: Path = ROOT) -> None:
    """Build a target of the Dockerfile."""
    words = [word for argument in arguments for word in ("--build-arg", argument)]
    docker("build", "-q", "--target", target, "-t", tag, *words, context, timeout=BUILD_S)


def build_all() -> None:
    """The two images and the stand-ins. What has not changed comes from the engine's cache."""
    build("serve", SERVE, f"BASE_IMAGE={base_image()}")
    bases = [f"TRAINER_BASE_IMAGE={base_image()}", f"TRAINER_BUILD_IMAGE={build_base()}"]
    build("trainer", TRAINER, "DEVICE=cpu", *bases)
    file = ROOT / "tests" / "docker" / "standin" / "Dockerfile"
    docker(
        "build", "-q", "-f", file, "--build-arg", f"TRAINER={TRAINER}", "-t", STANDIN, ROOT, timeout=BUILD_S
    )


def build_base() -> str:
    """The base with a llama-cpp-python that scripts/install has compiled; without one the build compiles it."""
    cache = os.environ.get("HOMESTILL_CACHE") or Path("~/.cache/homestill").expanduser()
    wheels = sorted(Path(cache).glob("wheels/*/llama_cpp_python-*.whl"))
    if not wheels:
        return base_image()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(wheels[-1], folder)
        Path(folder, "Dockerfile").write_text("ARG BASE\nFROM ${BASE}\nCOPY *.whl /wheels/\n", "utf-8")
        docker("build", "-q", "--build-arg", f"BASE={base_image()}", "-t", BUILD_BASE, folder)
    return BUILD_BASE


def inspect(name: str) -> Any:
    return json.loads(docker("inspect", name))[0]


def in_image(image: str, *words: str, check: bool = True) -> str:
    """What a command says in a container of the image that can reach nothing and is gone afterwards."""
    entry = ("--entrypoint", words[0])
    return docker("run", "--rm", "--network", "none", *entry, image, *words[1:], check=check)


def size(image: str) -> int:
    return int(inspect(image)["Size"])


def holds(image: str, texts: Iterable[bytes], folder: Path) -> list[bytes]:
    """Which of the texts stand in a layer or the configuration of an image."""
    archive = folder / "image.tar"
    docker("save", "-o", archive, image, timeout=300)
    wanted, found = list(texts), set()
    with tarfile.open(archive) as outer:
        for member in outer:
            file = outer.extractfile(member)
            if file is None:
                continue
            packed = file.read(2) == GZIP
            file.seek(0)
            tail = b""  # a text across two blocks is not missed
            content: IO[bytes] = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file
            while block := content.read(1 << 24):
                found |= {text for text in wanted if text in tail + block}
                tail = block[-256:]
    archive.unlink()
    return sorted(found)
