"""Studies: trainings of arms x seeds, and the statistics of their differences."""
