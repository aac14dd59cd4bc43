"""Measurements: speed against a plain twin, preparation of data, trainings that are killed."""

import pointewa.tools  # noqa: F401  (for its handling of SIGINT before torch is imported)
