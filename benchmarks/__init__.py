"""What is measured: speed beside a plain twin, preparing data, trainings that are killed."""

import tools  # noqa: F401  (what it does about SIGINT, before torch is imported)
