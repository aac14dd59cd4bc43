"""Looking at a data set as it is on disk, verifying it, and downloading it."""
