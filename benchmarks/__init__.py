"""What is measured: speed beside a plain twin, preparing data, trainings that are killed."""
