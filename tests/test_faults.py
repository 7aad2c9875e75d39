"""A few faults of each kind that `tools/faults` injects; the whole of it takes too long for every change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_injected_fault_is_noticed_or_harmless() -> None:
    command = [sys.executable, str(ROOT / "tools" / "faults"), "--count-share", "0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
