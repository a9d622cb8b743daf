"""A short sample of `make kills`."""

import kills
from conftest import QUICK


def test_signals_to_groups_save_and_leave_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "")  # restores it after the harness has set it
    reference = kills.outcome(finished[0])
    stages = ("compiling", "a save")
    harness = kills.GroupSignals(tmp_path / "signals", 2, 0, QUICK, reference, slow=0.05, stages=stages)
    assert harness.run() == []
