"""What looks like a key is found in what is to be carried, and nothing that is ours looks like one."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.bundle.secrets import Secrets

ROOT = Path(__file__).parents[3]
TAIL = "a1B2c3D4e5" * 5
STARTS = (
    *("sk-", "hf_", "gsk_", "xai-", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
    *("xoxb-", "xoxp-", "hs-"),
)


@pytest.mark.parametrize("start", STARTS)
def test_the_keys_of_common_providers_are_found_by_their_look(tmp_path: Path, start: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(f"key: {start}{TAIL}\n")
    assert Secrets({}).in_file(file) == f"what looks like a key ({start}…)"
    file.write_text(f"a word that starts with {start} is none, nor is {start}short or {TAIL}{start}{TAIL}\n")
    assert Secrets({}).in_file(file) is None


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_weights_are_searched_for_known_keys_alone(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"\x00gsk_" + TAIL.encode() + b"\x00")
    assert Secrets({}).in_file(file) is None
    assert Secrets({"GROQ_API_KEY": f"gsk_{TAIL}"}).in_file(file) == "the value of GROQ_API_KEY"


def test_nothing_of_ours_looks_like_a_key() -> None:
    folders = ("docker", "docs", "examples", "serve", "trainer")
    files = [path for each in folders for path in (ROOT / each).rglob("*") if path.is_file()]
    files += [ROOT / "compose.yaml", ROOT / "LICENSE"]
    assert {path: what for path in files if (what := Secrets({}).in_file(path))} == {}
