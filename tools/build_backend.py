"""scikit-build-core, which asks for a torch to build against only where there is none.

Any torch from 2.11 on will do: the operator library is on the stable ABI, and a library built against one torch runs
on them all. So the torch of the environment that is installed into serves, though build isolation hides it; listing
torch under [build-system] requires would fetch gigabytes to no end.
"""

import subprocess
import sys
from pathlib import Path

from scikit_build_core import build as _scikit
from scikit_build_core.build import *  # noqa: F403

_TORCH_TO_BUILD_AGAINST = "torch==2.13.0"


def _missing_torch():
    # -E leaves out PYTHONPATH, by which build isolation hides the environment's own packages. cmake/torch.cmake looks
    # in the same way.
    found = subprocess.run(
        [sys.executable, "-E", str(Path(__file__).with_name("find_torch.py"))], capture_output=True, check=False
    )
    return [] if found.returncode == 0 else [_TORCH_TO_BUILD_AGAINST]


def get_requires_for_build_wheel(config_settings=None):
    return _scikit.get_requires_for_build_wheel(config_settings) + _missing_torch()


def get_requires_for_build_editable(config_settings=None):
    return _scikit.get_requires_for_build_editable(config_settings) + _missing_torch()
