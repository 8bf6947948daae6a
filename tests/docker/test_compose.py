"""What compose.yaml promises, as compose itself reads it; no container is started."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOXES = {
    "gpu": "compose.yaml",
    "cpu": "compose.yaml:docker/cpu.yaml",
    "offline": "compose.yaml:docker/offline.yaml",
    "cpu-offline": "compose.yaml:docker/cpu.yaml:docker/offline.yaml",
}
pytestmark = [pytest.mark.docker]


def config(box: str, **environment: str) -> Any:
    """The box's services as compose sees them."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("no docker compose here")
    variables = {"COMPOSE_FILE": BOXES[box], "PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(Path.home())}
    command = ["docker", "compose", "--env-file", "/dev/null", "config", "--format", "json"]
    done = subprocess.run(
        command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("box", BOXES)
def test_no_container_can_do_more_than_it_needs(box: str) -> None:
    services = config(box)["services"]
    assert set(services) == {"setup", "ollama", "trainer", "serve"}
    for name, service in services.items():
        assert service["user"] == "10001:10001", name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "cap_add" not in service and "privileged" not in service, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) > 0 and service["pids_limit"] > 0, name
        assert service["restart"] == ("no" if name == "setup" else "unless-stopped"), name
        assert not any("docker.sock" in volume.get("source", "") for volume in service.get("volumes", [])), (
            name
        )


@pytest.mark.parametrize("box", BOXES)
def test_only_the_endpoint_is_published_and_on_loopback_alone(box: str) -> None:
    services = config(box)["services"]
    assert {name for name, service in services.items() if service.get("ports")} == {"serve"}
    assert [(port["host_ip"], port["published"]) for port in services["serve"]["ports"]] == [
        ("127.0.0.1", "8000")
    ]


@pytest.mark.parametrize("box", BOXES)
def test_ollama_has_no_way_out_and_no_cloud(box: str) -> None:
    found = config(box)
    assert list(found["services"]["ollama"]["networks"]) == ["inner"]
    assert found["networks"]["inner"]["internal"] is True
    assert found["services"]["ollama"]["environment"]["OLLAMA_NO_CLOUD"] == "1"
    assert (
        ":latest" not in found["services"]["ollama"]["image"] and ":" in found["services"]["ollama"]["image"]
    )


def test_the_gpu_is_asked_for_and_its_absence_is_no_secret() -> None:
    services = config("gpu")["services"]
    for name in ("ollama", "trainer"):
        devices = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["driver"] == "nvidia" and devices[0]["capabilities"] == ["gpu"]
    assert services["trainer"]["environment"]["HOMESTILL_REQUIRE_GPU"] == "1"
    assert services["trainer"]["build"]["args"]["DEVICE"] == "gpu"


def test_a_box_without_a_gpu_asks_for_none() -> None:
    services = config("cpu")["services"]
    assert not any((service.get("deploy") or {}).get("resources") for service in services.values())
    assert services["trainer"]["environment"]["HOMESTILL_REQUIRE_GPU"] == "0"
    assert services["trainer"]["build"]["args"]["DEVICE"] == "cpu"


@pytest.mark.parametrize("box", ["offline", "cpu-offline"])
def test_offline_the_trainer_has_no_way_out_and_nobody_a_teachers_key(box: str) -> None:
    found = config(box)
    services = found["services"]
    assert list(services["trainer"]["networks"]) == ["inner"]
    for name in ("trainer", "serve"):
        assert services[name]["environment"]["HOMESTILL_OFFLINE"] == "1"
        assert "teacher_key" not in {secret["source"] for secret in services[name].get("secrets") or []}
    options = found["networks"]["outer"]["driver_opts"]
    assert options == {"com.docker.network.bridge.enable_ip_masquerade": "false"}


def test_secrets_are_files_and_in_no_environment() -> None:
    found = config("gpu", TEACHER_KEY_FILE="/somewhere/teacher", API_KEYS_FILE="/somewhere/keys")
    assert found["secrets"]["teacher_key"]["file"] == "/somewhere/teacher"
    assert found["secrets"]["api_keys"]["file"] == "/somewhere/keys"
    for service in found["services"].values():
        assert not [name for name in service.get("environment") or {} if name.endswith("_KEY")]


def test_every_setting_of_the_example_is_one_of_the_box() -> None:
    text = "".join((ROOT / name).read_text("utf-8") for name in ("compose.yaml", "docker/cpu.yaml"))
    lines = [line.removeprefix("# ") for line in (ROOT / ".env.example").read_text("utf-8").splitlines()]
    names = {line.partition("=")[0] for line in lines if "=" in line and line.partition("=")[0].isupper()}
    assert "TEACHER_KEY_FILE" in names
    assert {name for name in names if f"${{{name}:-" not in text} == {"COMPOSE_FILE"}
