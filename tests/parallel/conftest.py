"""Process groups of each size, shared by all tests. They need the backend, which is an opt-in of the build."""

import os
from pathlib import Path

import pytest
import torch_sluice
from support.rank_pool import Pools

_LIBRARY = Path(torch_sluice.library_path()).with_name("libsluice_c10d.so")
_REASON = f"{_LIBRARY.name} is not built: -DSLUICE_BUILD_C10D=ON"


def pytest_collection_modifyitems(items):
    if _LIBRARY.is_file():
        return
    for item in items:
        if os.path.dirname(__file__) in str(item.path):
            item.add_marker(pytest.mark.skip(reason=_REASON))


@pytest.fixture(scope="session")
def ranks():
    """``ranks(4)``: a pool of four ranks. A test that breaks its group makes a pool of its own."""
    pools = Pools()
    yield pools
    pools.close()
