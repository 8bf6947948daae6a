"""Switches in the environment: the endpoint and the trainer take the same words."""

from __future__ import annotations

from collections.abc import Mapping

from serve.errors import SettingsError

WORDS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def switch(environment: Mapping[str, str], name: str) -> bool:
    """Whether it is on; not set, it is off.

    Raises:
        SettingsError: it is no word for on or off.
    """
    value = (environment.get(name) or "").lower()
    if value not in WORDS:
        raise SettingsError([f'{name} is "{value}"; use 1 or 0'])
    return WORDS[value]
