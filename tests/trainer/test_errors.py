"""What the system refuses is told in one line."""

from __future__ import annotations

import errno

import pytest

from trainer.errors import told


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOENT, "No such file or directory", "a.txt"), "a.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("the hub cannot be reached"), "the hub cannot be reached"),
    ],
)
def test_what_is_not_known_is_left_out(error: OSError, said: str) -> None:
    assert told(error) == said
