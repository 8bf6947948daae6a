"""What every test of a family from data to an answer needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trainer import export
from trainer.errors import ExportError


@pytest.fixture
def needs_the_converter() -> None:
    try:
        export.converter({})
    except ExportError as error:
        pytest.skip(str(error))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a model is slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
