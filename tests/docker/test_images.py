"""The two images: what is in them, what is not, and as whom they run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.docker import engine
from tests.docker.engine import SERVE, TRAINER, docker, in_image, inspect

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.usefixtures("images"),
]
BOTH = pytest.mark.parametrize("image", [SERVE, TRAINER])
COMPILERS = "for name in cc gcc g++ c++ clang make cmake ninja nvcc ld; do command -v $name; done; true"
PLANTED = b"sk-planted-" + b"0123456789abcdef"


def test_serve_is_slim() -> None:
    added = engine.size(SERVE) - engine.size(engine.base_image())
    assert added < 400e6, f"{added / 1e6:.0f} MB above its base"


def test_serve_holds_no_torch_and_no_trainer() -> None:
    code = (
        "from importlib.util import find_spec as f;"
        "print([n for n in ('torch', 'transformers', 'dspy', 'trainer', 'pip') if f(n)], bool(f('serve')))"
    )
    assert in_image(SERVE, "python", "-c", code) == "[] True"


@BOTH
def test_no_compiler_and_no_pip_is_left(image: str) -> None:
    assert in_image(image, "sh", "-c", COMPILERS) == ""
    assert in_image(image, "sh", "-c", "ls /opt/homestill/bin | grep -c '^pip' || true") == "0"


@BOTH
def test_it_runs_as_nobody_in_particular(image: str) -> None:
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert in_image(image, "sh", "-c", "id -u; test -w /opt/homestill || echo closed") == "10001\nclosed"


@BOTH
def test_the_list_of_parts_is_whole(image: str) -> None:
    bom = json.loads(in_image(image, "cat", "/usr/share/homestill/sbom.json"))
    assert bom["bomFormat"] == "CycloneDX"
    assert bom["metadata"]["component"]["name"] == "homestill"
    listed = {part["name"].lower().replace("_", "-") for part in bom["components"]}
    code = "from importlib.metadata import distributions as d; print(*(x.name for x in d()))"
    installed = {name.lower().replace("_", "-") for name in in_image(image, "python", "-c", code).split()}
    assert installed <= listed | {"homestill"}
    assert {"uvicorn", "numpy"} <= listed
    assert ("torch" in listed) == (image == TRAINER)


def test_the_trainer_holds_converter_and_runtime_of_one_version() -> None:
    code = (
        "import os, llama_cpp; from trainer.export import converter;"
        "print(llama_cpp.__version__, converter(os.environ).name)"
    )
    assert in_image(TRAINER, "python", "-c", code).split()[1] == "llama.cpp"


def test_every_command_of_homestill_is_the_trainers() -> None:
    assert "homestill watch" in docker("run", "--rm", "--network", "none", TRAINER, "watch", "--help")
    assert "is valid" in docker(
        "run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp",
        "-v", f"{engine.ROOT / 'examples' / 'tickets'}:/data/tasks/tickets:ro", TRAINER, "check", "tasks/tickets",
    )  # fmt: skip


def test_the_endpoint_refuses_to_be_open_to_others() -> None:
    done = docker("run", "--rm", "--network", "none", "--read-only", "--tmpfs", "/tmp", SERVE, "keys", "list")
    assert done == ""
    assert in_image(SERVE, "sh", "-c", "python -m serve --host 0.0.0.0 2>&1; echo $?", check=False).endswith(
        "2"
    )


def test_a_trainer_that_needs_a_gpu_says_so_loudly() -> None:
    command = "mkdir -p /tmp/tasks; HOMESTILL_REQUIRE_GPU=1 homestill watch /tmp/tasks 2>&1; echo code $?"
    said = in_image(TRAINER, "sh", "-c", command)
    assert "this container would train on the CPU" in said
    assert said.endswith("code 1")


class TestSecrets:
    def test_what_lies_beside_the_source_is_in_no_layer(self, tmp_path: Path) -> None:
        checkout = tmp_path / "checkout"
        for name in ("serve", "docker", "requirements"):
            shutil.copytree(engine.ROOT / name, checkout / name)
        for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(engine.ROOT / name, checkout / name)
        for place in (".env", "secrets/teacher_key", "serve/.env.local", "id_rsa"):
            (checkout / place).parent.mkdir(exist_ok=True)
            (checkout / place).write_bytes(PLANTED)
        base = f"BASE_IMAGE={engine.base_image()}"
        engine.build("serve", "homestill-test/planted", base, context=checkout)
        assert engine.holds("homestill-test/planted", [PLANTED], tmp_path) == []
        docker("image", "rm", "homestill-test/planted")

    def test_the_search_finds_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "Dockerfile").write_text(f"FROM {engine.base_image()}\nCOPY key /\nRUN rm /key\n")
        (tmp_path / "key").write_bytes(PLANTED)
        docker("build", "-q", "-t", "homestill-test/leaking", tmp_path)
        assert engine.holds("homestill-test/leaking", [PLANTED], tmp_path) == [PLANTED]
        docker("image", "rm", "homestill-test/leaking")
