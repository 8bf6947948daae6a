"""What the trainer takes of the endpoint's code raises errors of the endpoint; here they become ours, once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve.errors import JournalError
from serve.release import ReleaseInvalid
from trainer.errors import ReleaseError, StoreError


@contextmanager
def translated() -> Iterator[None]:
    """Around every use of the journal and of releases.

    Raises:
        StoreError: the journal cannot be opened, read or written.
        ReleaseError: a release cannot be used.
    """
    try:
        yield
    except JournalError as error:
        raise StoreError(str(error)) from error
    except ReleaseInvalid as error:
        raise ReleaseError(str(error)) from error
