"""The benchmark of how threads wait: it runs, and each setting is in force where it is measured."""

import json
import os

from benchmarks import waiting


def spin_count():
    return {"step": lambda: print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)}


def test_it_measures_every_setting_idle_and_busy(monkeypatch, capfd):
    monkeypatch.setattr(waiting, "training_step", spin_count)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # the user's own does not count here
    waiting.main(["--budget", "0", "--json"])
    *seen, line = capfd.readouterr().out.splitlines()
    assert set(seen) == {"300000 None", "10000 None", "None passive"}
    times = json.loads(line)
    assert all(times[when][name]["median"] > 0 for when in ("idle", "busy") for name in waiting.SETTINGS)
