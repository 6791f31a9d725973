"""Made-up analyses for the tests of drawings."""

from __future__ import annotations

import pytest
import xarray as xr
from made_up import make_dataset


@pytest.fixture(scope="session")
def square() -> xr.Dataset:
    """8 x 8 patches, 3 layers, 2 images."""
    return make_dataset()


@pytest.fixture(scope="session")
def oblong() -> xr.Dataset:
    """6 x 9 patches with two rows of zeros, one image."""
    return make_dataset(6, 9, names=("wide.jpg",), zero_rows=(0, 31))
