"""Point-cloud transformers, and Experts Weights Averaging (EWA) for any ViT.

`load` gives a trained model that is ready to classify; all else is in the packages below this one.
"""

import importlib
from typing import Any

_LAZY = {"Predictor": "pointewa.inference.predict", "load": "pointewa.inference.predict"}

__all__ = ["Predictor", "load"]
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    # Only when it is asked for: `import pointewa.ewa` needs torch only, and is quick.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
