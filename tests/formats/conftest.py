"""Packed exports are made once for all formats."""

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.formats.packed import GRIDS, Tiny, write_tiny_packed


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """(family, key of GRIDS, dtype) -> its packed export, which nobody changes."""

    @cache
    def make(family: str, grids: str, dtype: torch.dtype = torch.bfloat16) -> Tiny:
        return write_tiny_packed(family, tmp_path_factory.mktemp("tiny"), GRIDS[grids], dtype=dtype)

    return make
