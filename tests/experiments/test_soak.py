"""Fault 42 in small: hosts and coordinator killed, stopped and cut off at random; then one process replays."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

SOAK = Path(__file__).parents[2] / "experiments" / "soak.py"


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="the relay listens at a second loopback address")
def test_row_42_a_soak_and_its_replay_agree(tmp_path: Path) -> None:
    words = ["--seconds", "15", "--seed", "1", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SOAK), *words], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["agrees"]
    assert found["steps"] >= 10
    assert sum(found["faults"].values()) >= 3
