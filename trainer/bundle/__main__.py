"""`python -m trainer.bundle`: verify, copy and load a bundle. It is also what `tool.pyz` in every bundle runs."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.bundle.contents import BUNDLE, CHECKSUMS, SIGNATURE, Contents
from trainer.bundle.load import Host, Import, Register, load, load_box
from trainer.bundle.meter import Meter
from trainer.bundle.verify import check, part_is, signed_contents, trusted_key
from trainer.errors import HomestillError, told

EPILOG = """\
The trusted key is the public key of whoever made the bundle: 64 hex digits, or a file that holds them. Get it
another way than with the bundle. For the same reason a careful person runs a verifier that did not come with
the bundle: whoever can change a bundle can change the tool.pyz in it, too.
"""


NEXT = """\
next, in {box}: copy .env.example to .env, set COMPOSE_FILE=compose.yaml:docker/offline.yaml in it, and run
  docker compose run --rm -v {bundle}:/bundle:ro trainer load /bundle --trust {key}
  docker compose up -d"""


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Do what the command line says; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        key = trusted_key(options.trust)
        if options.action == "copy":
            _copy(options.bundle, options.to, key)
        contents = check(options.to if options.action == "copy" else options.bundle, BUNDLE, key)
        _say(f"verified: {_described(contents)}, signed by {key.hex()}")
        if options.action == "load":
            host = _host(options, os.environ if environment is None else environment)
            if host.box:
                load_box(options.bundle, contents, host, _say, force=options.force)
                _say(NEXT.format(bundle=options.bundle.resolve(), box=host.box, key=key.hex()))
            else:
                load(options.bundle, contents, host, _say, force=options.force)
            _say("loaded")
    except HomestillError as error:
        for line in str(error).splitlines():
            sys.stderr.write(f"error: {line}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {told(error)}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="homestill bundle tool",
        description="Verify, copy or load a bundle.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    texts = {
        "verify": "is every byte what the key's owner signed?",
        "copy": "copy to another folder, going on where an earlier copy stopped",
        "load": "verify, then install or upgrade; safe to run again",
    }
    for action, text in texts.items():
        one = actions.add_parser(action, help=text, description=text)
        one.add_argument("bundle", type=Path, nargs=None if action == "copy" else "?", default=_here())
        if action == "copy":
            one.add_argument("to", type=Path)
        one.add_argument("--trust", required=True, metavar="KEY", help="public key of the bundle's maker")
        if action == "load":
            _load_options(one)
    return parser


def _load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, help="HOMESTILL_HOME (default: that variable, or ~/.homestill)")
    parser.add_argument("--tasks", type=Path, help="folder for task folders (default: tasks/ in the home)")
    parser.add_argument(
        "--box",
        type=Path,
        metavar="DIR",
        help="load images, and put compose files and tasks there; nothing else",
    )
    parser.add_argument("--no-images", action="store_true", help="leave container images in the bundle")
    parser.add_argument("--force", action="store_true", help="also replace what is newer")


def _here() -> Path:
    """The bundle that this tool travels in, where it does."""
    started = Path(sys.argv[0])
    return started.parent if started.suffix == ".pyz" else Path()


def _host(options: argparse.Namespace, environment: Mapping[str, str]) -> Host:
    home = (options.home or Path(environment.get("HOMESTILL_HOME") or "~/.homestill")).expanduser().resolve()
    cache = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Host(
        home,
        options.tasks or home / "tasks",
        Path(environment.get("HF_HUB_CACHE") or cache / "hub"),
        None if options.no_images else shutil.which("docker"),
        options.box,
        _importer(home),
        _registrar(home, environment),
    )


def _importer(home: Path) -> Import | None:
    """Takes traces into the store, where all of Homestill is installed."""
    if not all(importlib.util.find_spec(name) for name in ("trainer.bundle.carry", "sqlalchemy")):
        return None
    from trainer.bundle.carry import take
    from trainer.runs import Home

    return lambda file: take(file, Home(home)).sentence()


def _registrar(home: Path, environment: Mapping[str, str]) -> Register | None:
    """Registers models with Ollama, where all of Homestill is installed and Ollama is what serves."""
    if not all(importlib.util.find_spec(name) for name in ("trainer.bundle.models", "ollama")):
        return None
    from trainer.bundle.models import register
    from trainer.runs import Home
    from trainer.runtimes.choice import choice, ollama

    if choice(environment) != "ollama":
        return None
    server = ollama(environment)
    return lambda task, version, told: register(Home(home), task, version, told, server)


def _copy(source: Path, target: Path, key: bytes) -> None:
    """Copy what is not there yet; a copy that was stopped goes on with the part that it stopped in."""
    contents = signed_contents(source, BUNDLE, key)
    meter = Meter("copying", sum(file.bytes for file in contents.files))
    for part in contents.parts():
        path = target / part.name
        if not part_is(path, part):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            shutil.copyfile(source / part.name, partial)
            partial.replace(path)
        meter.add(part.bytes)
    for name in (SIGNATURE, CHECKSUMS):
        shutil.copyfile(source / name, target / name)


def _described(contents: Contents) -> str:
    size = sum(file.bytes for file in contents.files)
    return f"bundle of {contents.created}, {len(contents.files)} files, {size / 1e6:.1f} MB"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
