"""Licences and notices that travel with a bundle, and the list of software in it (CycloneDX 1.6).

Both are made from what is installed here and from the files beside the base models; nothing is looked up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

NAME = "homestill"
EXTRAS = ("serve", "predict", "train", "gpu", "tracing")
"""Of ours: everything but the tools for tests."""
TEXTS = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "USE-POLICY*")
LLAMA = re.compile(r"llama[-_ ]?(\d(?:\.\d)?)", re.IGNORECASE)


def distributions() -> list[Distribution]:
    """What Homestill needs, directly or by way of another, as far as it is installed here; by name."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(f"{NAME}[{','.join(EXTRAS)}]")]
    seen: set[str] = set()
    while waiting:
        wanted = waiting.pop()
        key = f"{_plain(wanted.name)}[{','.join(sorted(wanted.extras))}]"
        if key in seen:
            continue
        seen.add(key)
        try:
            there = distribution(wanted.name)
        except PackageNotFoundError:
            continue  # an extra that this machine does not have, such as the one for GPUs
        found[_plain(wanted.name)] = there
        waiting += [
            each for text in there.requires or [] if _applies(each := Requirement(text), wanted.extras)
        ]
    return [found[name] for name in sorted(found)]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def licence(software: Distribution) -> str:
    """A package's licence as it states it: an SPDX expression, a name, or its classifiers."""
    about = software.metadata
    stated = _first(about.get_all("License-Expression"))
    if not stated:
        classifiers = [text for text in about.get_all("Classifier") or [] if text.startswith("License ::")]
        stated = "; ".join(text.rpartition(" :: ")[2] for text in classifiers)
    if not stated:
        stated = _first(about.get_all("License"))
    return stated or "not stated"


def _first(values: list[str] | None) -> str:
    """The first line of the first value: some packages put a whole licence there."""
    return values[0].strip().split("\n")[0] if values else ""


def sbom(software: Iterable[Distribution], created: str) -> bytes:
    """CycloneDX 1.6 as JSON. `created`: `20261121T073000Z`."""
    components = [
        {
            "type": "library",
            "name": each.metadata["Name"],
            "version": each.version,
            "purl": f"pkg:pypi/{_plain(each.metadata['Name'])}@{each.version}",
            "licenses": [{"license": {"name": licence(each)}}],
        }
        for each in software
    ]
    moment = f"{created[:4]}-{created[4:6]}-{created[6:11]}:{created[11:13]}:{created[13:15]}Z"
    return _json(
        {
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"timestamp": moment, "component": {"type": "application", "name": NAME}},
            "components": components,
        }
    )


def third_party(software: Iterable[Distribution]) -> bytes:
    """Name, version and licence of every package, and the texts of the licences that came with it."""
    pieces = ["Software that Homestill uses, and its licences as the packages state them.\n"]
    for each in software:
        pieces.append(f"\n{'=' * 78}\n{each.metadata['Name']} {each.version}: {licence(each)}\n")
        pieces += [f"\n--- {name} ---\n{text}" for name, text in _texts(each)]
    return "".join(pieces).encode()


def _texts(software: Distribution) -> list[tuple[str, str]]:
    files = [
        file
        for file in software.files or []
        if re.match(r"(licen[cs]e|notice|copying)", file.name, re.IGNORECASE) and ".dist-info" in str(file)
    ]
    found = []
    for file in files:
        path = Path(str(file.locate()))
        if path.is_file():
            found.append((file.name, path.read_text(encoding="utf-8", errors="replace")))
    return found


def notice(bases: Mapping[str, Path]) -> bytes:
    """What must be said of the models, by the names of their bases and their folders."""
    pieces = ["This bundle carries Homestill (Apache License 2.0, see legal/LICENSE) and these models:\n"]
    for name, folder in sorted(bases.items()):
        pieces.append(f"\n{name}\n")
        if match := LLAMA.search(name):
            pieces.append(
                f"  Built with Llama. Llama {match[1]} is licensed under the Llama {match[1]} Community License,\n"
                "  Copyright © Meta Platforms, Inc. All Rights Reserved. Models fine-tuned from it carry these terms;\n"
                "  the name of a model that is passed on must begin with “Llama”.\n"
            )
        texts = model_texts(folder)
        listed = ", ".join(f"legal/models/{_folder(name)}/{file.name}" for file in texts)
        pieces.append(
            f"  Its terms: {listed}\n"
            if texts
            else "  No licence text lies beside it; see where it came from.\n"
        )
    return "".join(pieces).encode()


def model_texts(folder: Path) -> list[Path]:
    """Licence, notice and use policy that lie beside a model."""
    return sorted({file for pattern in TEXTS for file in folder.glob(pattern) if file.is_file()})


def model_folder(name: str) -> str:
    """Where those of a base lie in the bundle."""
    return f"legal/models/{_folder(name)}"


def _folder(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "--", name).strip(".-") or "base"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
