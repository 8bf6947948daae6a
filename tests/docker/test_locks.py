"""The locks under requirements/: every package with hashes, at the versions that pyproject.toml pins."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.M)
ENTRY = re.compile(
    r"^[A-Za-z0-9._-]+==\S+(?: ;[^\\\n]*)? \\\n(?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", re.M
)
EXTRAS = {
    "serve": ("serve",),
    "predict": ("serve", "predict"),
    "trainer-cpu": ("serve", "train"),
    "trainer-gpu": ("serve", "train", "gpu"),
}


def lock(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")


def versions(text: str) -> dict[str, str]:
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in PIN.findall(text)}


def pinned(*extras: str) -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return versions("\n".join(pin for each in lists for pin in each))


@pytest.mark.parametrize("name", [*EXTRAS, "llama", "build"])
def test_every_package_has_a_hash_and_no_index_is_named(name: str) -> None:
    text = lock(name)
    assert len(ENTRY.findall(text)) == len(PIN.findall(text)) > 0
    assert "://" not in text and "--index" not in text and "--find-links" not in text


@pytest.mark.parametrize("name", EXTRAS)
def test_versions_are_those_of_pyproject(name: str) -> None:
    """Where this fails, run scripts/lock."""
    found, wanted = versions(lock(name)), pinned(*EXTRAS[name])
    if name.startswith("trainer"):
        found |= versions(lock("llama"))
    if name == "trainer-cpu":
        wanted["torch"] += "+cpu"
    assert {package: found.get(package) for package in wanted} == wanted


def test_serve_brings_no_torch_and_a_cpu_box_no_cuda() -> None:
    assert not {"torch", "transformers", "dspy"} & set(versions(lock("serve")))
    assert not [name for name in versions(lock("trainer-cpu")) if name.startswith(("nvidia-", "triton"))]
    assert [name for name in versions(lock("trainer-gpu")) if name.startswith("nvidia-")]


def test_shared_packages_are_one_version_in_both_images() -> None:
    serve = versions(lock("serve"))
    for name in ("trainer-cpu", "trainer-gpu"):
        other = versions(lock(name))
        assert {package: other[package] for package in serve if package in other} == {
            package: version for package, version in serve.items() if package in other
        }
