"""`python -m serve`: the endpoint on a port."""

from __future__ import annotations

import argparse
import gc
import ipaddress
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from serve import journal_cli, keys_cli
from serve.app import create_app
from serve.errors import ServeError, SettingsError
from serve.guard.keys import Keys
from serve.listen import configuration
from serve.records.journal import Journal
from serve.settings import Settings
from serve.upstreams.local import choose
from serve.upstreams.teacher import Teachers
from serve.upstreams.upstream import connect
from serve.watching.logs import AccessLog, configured

EXAMPLES = """\
examples:
  python -m serve                                  what HOMESTILL_HOME holds, on 127.0.0.1:8000
  HOMESTILL_LOCAL=ollama python -m serve           the local model runs in Ollama (OLLAMA_HOST)
  HOMESTILL_OFFLINE=1 python -m serve              the local model answers everything
  python -m serve keys add alice --daily-usd 5     a key of one's own; it is shown once
  python -m serve --host 0.0.0.0                   for other machines, once there are keys
  python -m serve journal stats                    what was asked, answered and paid

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "tickets", "messages": [{"role": "user", "content": "…"}]}'

environment:
  HOMESTILL_HOME              releases/, serve.yaml (rules, caps, prices), keys.json, journal.db, budget.db
                              (default ~/.homestill)
  HOMESTILL_LOCAL             ollama, embedded, or the URL of an OpenAI-compatible server
  OLLAMA_HOST                 where Ollama listens; set, it makes ollama the default
  HOMESTILL_OFFLINE           1: no teacher client is constructed
  HOMESTILL_API_KEYS          keys that clients must send, separated by commas, beside those of keys.json
  HOMESTILL_TEACHER_API_BASE  the teacher's address (default: the release's, https://api.openai.com/v1)
  HOMESTILL_TEACHER_MODEL     the teacher asked before a task's first release (default: as the client names it)
  OPENAI_API_KEY              the teacher's key; or HOMESTILL_TEACHER_KEY_FILE, a file that holds it
"""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m serve",
        description="One OpenAI-compatible endpoint: the local model where it is proven, the teacher elsewhere.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default 8000; 0: any free one)"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="other commands")
    keys_cli.add_parser(commands)
    journal_cli.add_parser(commands)
    return parser


def check_binding(host: str, port: int, settings: Settings) -> None:
    """Other machines are let in with keys only.

    Raises:
        SettingsError
    """
    faults = []
    if not 0 <= port <= 65535:
        faults.append(f"--port is {port}; use 0-65535")
    if not _is_loopback(host) and not Keys(settings.api_keys, settings.keys_file).required:
        faults.append(
            f"--host is {host}, which other machines reach, and there are no keys; "
            "add one (python -m serve keys add NAME), set HOMESTILL_API_KEYS, or listen on 127.0.0.1"
        )
    if faults:
        raise SettingsError(faults)


def build(settings: Settings, journal: Journal, host: str = "127.0.0.1") -> ASGIApp:
    """The application as the settings describe it. Offline, no teacher client is constructed.

    Args:
        host: the address that it listens on. On one that stands for all of them the Host header cannot
            tell anything, and keys are required.
    """
    teachers = None if settings.offline else Teachers(settings, connect(proxies=True))
    local = choose(settings, connect(proxies=False))
    log = AccessLog(settings.config.log_format)
    names = ["*" if host in EVERYWHERE else host]
    return create_app(settings, local, teachers, journal, observers=[log.observe], hosts=names)


def main(argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Serve until interrupted; the exit code."""
    options = arguments().parse_args(argv)
    try:
        settings = Settings.from_environment(os.environ if environment is None else environment)
        if options.command:
            return COMMANDS[options.command](options, settings.home)
        return serve(options.host, options.port, settings)
    except (ServeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


YOUNG_OBJECTS = 20_000
"""New objects between two collections; Python's own 700 is a few requests."""
EVERYWHERE = ("0.0.0.0", "::")
COMMANDS = {"keys": keys_cli.run, "journal": journal_cli.run}


def serve(host: str, port: int, settings: Settings) -> int:
    """The endpoint, until it is told to end.

    Raises:
        ServeError, OSError: it cannot begin.
    """
    check_binding(host, port, settings)
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will hold what people asked
    journal = Journal(settings.journal_url)
    # uvicorn ends in good order and then raises the signal again: without this the journal stays open.
    signal.signal(signal.SIGTERM, _exit)
    try:
        with configured(settings.config.log_format), suppress(KeyboardInterrupt):
            app = build(settings, journal, host)
            _rarely_collect()
            uvicorn.Server(configuration(app, host, port, settings.config.limits)).run()
    finally:
        journal.close()
    return 0


def _rarely_collect() -> None:
    """Requests leave hardly any cycles, and a look through all that was imported holds every one of them up."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 50)


def _exit(*_: object) -> None:
    sys.exit(0)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
