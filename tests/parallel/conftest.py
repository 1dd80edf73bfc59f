"""Process groups of each size, shared by all tests."""

import os

import pytest
from support.rank_pool import Pools

os.environ["SLUICE_COMM_TUNING"] = "off"  # what this user has measured is no part of the tests


@pytest.fixture(scope="session")
def ranks():
    """``ranks(4)``: a pool of four ranks. A test that breaks its group makes a pool of its own."""
    pools = Pools()
    yield pools
    pools.close()
