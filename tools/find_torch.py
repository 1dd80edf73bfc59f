"""Prints the folder of the torch that this Python has, if it is new enough to build against; else says why on stderr.

Reads the package's metadata only: importing torch takes seconds and may need a driver.
"""

import importlib.metadata
import re
import sys
from pathlib import Path

OLDEST = (2, 11)


def find_torch() -> Path:
    """Folder of the installed torch package; RuntimeError with a sentence if there is none, or none new enough."""
    try:
        distribution = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f"{sys.executable} has no torch") from None
    folder = Path(str(distribution.locate_file("torch"))).resolve()
    version = re.match(r"(\d+)\.(\d+)", distribution.version)
    if not version or tuple(map(int, version.groups())) < OLDEST:
        raise RuntimeError(f"torch is {distribution.version} in {folder}, expected {OLDEST[0]}.{OLDEST[1]} or later")
    if not (folder / "include" / "torch" / "csrc" / "stable").is_dir():
        raise RuntimeError(f"torch in {folder} has no stable-ABI headers (include/torch/csrc/stable)")
    return folder


if __name__ == "__main__":
    try:
        print(find_torch(), end="")
    except RuntimeError as error:
        sys.exit(str(error))
