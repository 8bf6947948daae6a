"""What the trainer takes of the endpoint's code raises errors of the endpoint; here they become ours, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from serve.errors import JournalError, SettingsError
from serve.release import ReleaseInvalid
from serve.switch import switch
from trainer.errors import PreflightError, ReleaseError, StoreError


@contextmanager
def translated() -> Iterator[None]:
    """Around every use of the journal, of releases and of switches.

    Raises:
        StoreError: the journal cannot be opened, read or written.
        ReleaseError: a release cannot be used.
        PreflightError: a switch is neither on nor off.
    """
    try:
        yield
    except JournalError as error:
        raise StoreError(str(error)) from error
    except ReleaseInvalid as error:
        raise ReleaseError(str(error)) from error
    except SettingsError as error:
        raise PreflightError(error.faults) from error


def offline(environment: Mapping[str, str]) -> bool:
    """HOMESTILL_OFFLINE: no teacher client is ever made, and model hubs are switched off.

    Raises:
        PreflightError: it is neither on nor off.
    """
    with translated():
        return switch(environment, "HOMESTILL_OFFLINE")


def gpu_required(environment: Mapping[str, str]) -> bool:
    """HOMESTILL_REQUIRE_GPU: training on the CPU would be a mistake here.

    Raises:
        PreflightError: it is neither on nor off.
    """
    with translated():
        return switch(environment, "HOMESTILL_REQUIRE_GPU")
