"""The script in docs/parallel.md runs as it stands, under torchrun with four ranks, and learns."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/parallel.md"


def test_the_script_of_the_page_trains_on_a_mesh(tmp_path):
    pytest.importorskip("transformers")
    (script,) = re.findall(r"test_own_script.py runs it -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(script.splitlines()) <= 40
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tmp_path / "script.py")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGTERM)  # torchrun ends its ranks
        raise
    finally:
        if process.poll() is None:
            process.communicate()
    assert process.returncode == 0, errors
    losses = [float(line.split()[1]) for line in output.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1  # four of 256 bytes occur
