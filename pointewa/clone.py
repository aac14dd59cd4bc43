"""Where `datasets/`, `tools/` and `configs/` are: in a clone beside the package, in an installed package inside it.

They lie beside it so that whoever clones finds and extends them, and are imported as `pointewa.datasets.layouts` and
`pointewa.tools`, since their own names belong to other libraries too.
"""

from pathlib import Path

_HERE = Path(__file__).parent
ROOT = _HERE.parent if (_HERE.parent / "configs" / "arm" / "ewa.yaml").is_file() else None  # of the clone, if it is one
CONFIGS = (ROOT or _HERE) / "configs"


def beside(folder: str) -> list[str]:
    """What ``__path__`` of the package that stands for a folder of the clone lacks."""
    return [str(ROOT / folder)] if ROOT else []
