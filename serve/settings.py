"""The server's settings, from the environment and serve.yaml; nothing else in `serve` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from serve.config import Config, load
from serve.errors import SettingsError
from serve.switch import switch

OPENAI = "https://api.openai.com/v1"
OLLAMA_PORT = 11434
RUNTIMES = ("ollama", "embedded")


@dataclass(frozen=True)
class Settings:
    """What the server is told. Keys never show in its `repr`."""

    home: Path
    """HOMESTILL_HOME: `releases/`, `serve.yaml` and `keys.json` are read, `journal.db` and `budget.db` written."""
    local: str = "embedded"
    """HOMESTILL_LOCAL: `ollama`, `embedded` or the URL of an OpenAI-compatible server.
    Not set, it is `ollama` where OLLAMA_HOST is set, else `embedded`."""
    ollama_url: str = f"http://127.0.0.1:{OLLAMA_PORT}"
    """OLLAMA_HOST as a URL."""
    offline: bool = False
    """HOMESTILL_OFFLINE: no teacher client is constructed."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """HOMESTILL_API_KEYS, separated by commas; empty: every client is let in."""
    teacher_api_base: str | None = None
    """HOMESTILL_TEACHER_API_BASE: the teacher's address, whatever a release says."""
    teacher_model: str | None = None
    """HOMESTILL_TEACHER_MODEL: asked where no release names a teacher; None: the model that the client names."""
    teacher_key: str | None = field(default=None, repr=False)
    """OPENAI_API_KEY, or the content of HOMESTILL_TEACHER_KEY_FILE."""
    config: Config = field(default_factory=Config)
    """`serve.yaml` in HOMESTILL_HOME."""

    @property
    def releases(self) -> Path:
        return self.home / "releases"

    @property
    def keys_file(self) -> Path:
        return self.home / "keys.json"

    @property
    def budget_file(self) -> Path:
        return self.home / "budget.db"

    @property
    def journal_url(self) -> str:
        return f"sqlite:///{self.home / 'journal.db'}"

    @property
    def runtime(self) -> str:
        """As a release's router.json binds it: `ollama`, `embedded` or `url`."""
        return self.local if self.local in RUNTIMES else "url"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read and validate.

        Raises:
            SettingsError: with every fault found.
        """
        faults: list[str] = []
        home = Path(environment.get("HOMESTILL_HOME") or "~/.homestill").expanduser().resolve()
        settings = cls(
            home=home,
            local=_local(environment, faults),
            ollama_url=_ollama_url(environment.get("OLLAMA_HOST") or "", faults),
            offline=_switch(environment, "HOMESTILL_OFFLINE", faults),
            api_keys=_keys(environment, faults),
            teacher_api_base=_url(environment, "HOMESTILL_TEACHER_API_BASE", faults),
            teacher_model=environment.get("HOMESTILL_TEACHER_MODEL") or None,
            teacher_key=_teacher_key(environment, faults),
            config=_config(home / "serve.yaml", faults),
        )
        if faults:
            raise SettingsError(faults)
        return settings


def _config(path: Path, faults: list[str]) -> Config:
    try:
        return load(path)
    except SettingsError as error:
        faults += error.faults
        return Config()


def _local(environment: Mapping[str, str], faults: list[str]) -> str:
    given = environment.get("HOMESTILL_LOCAL") or ("ollama" if environment.get("OLLAMA_HOST") else "embedded")
    if given in RUNTIMES:
        return given
    if not _is_url(given):
        faults.append(
            f'HOMESTILL_LOCAL is "{given}"; use ollama, embedded or the URL of an OpenAI-compatible server'
        )
    return f"{given.rstrip('/').removesuffix('/v1')}/v1"


def _ollama_url(host: str, faults: list[str]) -> str:
    """OLLAMA_HOST by Ollama's own rules: a bare host means http and port 11434; 0.0.0.0 is for binding only."""
    if not host:
        return f"http://127.0.0.1:{OLLAMA_PORT}"
    url = host.rstrip("/") if "://" in host else f"http://{host.rstrip('/')}"
    if not _is_url(url):
        faults.append(f'OLLAMA_HOST is "{host}"; use host, host:port or a URL')
        return url
    if "://" not in host and urlsplit(url).port is None:
        url = f"{url}:{OLLAMA_PORT}"
    return url.replace("//0.0.0.0", "//127.0.0.1", 1)


def _url(environment: Mapping[str, str], name: str, faults: list[str]) -> str | None:
    value = environment.get(name)
    if value and not _is_url(value):
        faults.append(f'{name} is "{value}"; use a URL such as {OPENAI}')
    return value.rstrip("/") if value else None


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        return False


def _switch(environment: Mapping[str, str], name: str, faults: list[str]) -> bool:
    try:
        return switch(environment, name)
    except SettingsError as error:
        faults += error.faults
        return True


def _keys(environment: Mapping[str, str], faults: list[str]) -> tuple[str, ...]:
    given = environment.get("HOMESTILL_API_KEYS") or ""
    keys = tuple(key.strip() for key in given.split(",")) if given.strip() else ()
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        faults.append(
            "HOMESTILL_API_KEYS holds an empty or unprintable key; use printable keys separated by commas"
        )
    return keys


def _teacher_key(environment: Mapping[str, str], faults: list[str]) -> str | None:
    file = environment.get("HOMESTILL_TEACHER_KEY_FILE")
    if not file:
        return (environment.get("OPENAI_API_KEY") or "").strip() or None
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f'HOMESTILL_TEACHER_KEY_FILE "{file}" cannot be read ({error}); name a readable file')
        return None
    if not key or len(key.split()) > 1:
        faults.append(
            f'HOMESTILL_TEACHER_KEY_FILE "{file}" does not hold one key; write the key alone into it'
        )
    return key
