"""Command lines, a file each: `python -m tools.train`, or `pointewa train` where the package is installed."""

import pointewa.tools  # noqa: F401  first, see there
