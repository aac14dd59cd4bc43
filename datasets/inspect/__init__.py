"""Looking at a data set as it lies on disk, checking it, and getting it."""
