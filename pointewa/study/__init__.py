"""Arms x seeds of trainings, and what their differences say."""
