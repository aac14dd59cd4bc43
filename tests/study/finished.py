"""Run folders as finished trainings leave them."""

import json

from pointewa.config import to_yaml
from pointewa.runs.log import METRICS
from pointewa.runs.summary import SUMMARY
from pointewa.runs.weights import RUN_CONFIG


def finish(run, oa, seconds=2.0, precision="float32"):
    """Leave what a finished run leaves."""
    run.folder.mkdir(parents=True)
    (run.folder / RUN_CONFIG).write_text(to_yaml(run.config))
    test = {"oa": oa, "macc": oa / 2, "loss": 1}
    summary = {"dataset": "shapes", "epochs": 2, "test": test, "test_before_folding": None, "seconds": seconds}
    summary |= {"parameters": 7, "parameters_in_training": 9, "precision": precision}
    (run.folder / SUMMARY).write_text(json.dumps(summary))
    lines = [json.dumps({"epoch": epoch, "train/loss": oa / 10 - epoch}) for epoch in (0, 1)]
    (run.folder / METRICS).write_text("\n".join(lines) + "\n")
