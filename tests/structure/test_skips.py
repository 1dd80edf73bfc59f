"""Tests that need a GPU are skipped with the reason, and only then."""

import pytest
from support.devices import missing_gpu


@pytest.mark.parametrize(
    ("has_device", "has_kernels", "reason"),
    [
        (False, False, "no CUDA device on this machine"),
        (False, True, "no CUDA device on this machine"),
        (True, False, "the operator library has no CUDA kernels: build it with -DSLUICE_BUILD_CUDA=ON"),
        (True, True, None),
    ],
)
def test_the_reason_is_what_is_missing(has_device, has_kernels, reason):
    assert missing_gpu(has_device, has_kernels) == reason
