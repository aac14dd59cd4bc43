"""Training in few bits: activations between the forward and the backward pass, gradients between processes.

For any model and loop; imports torch only.
"""

from pointewa.compression.adaptive import adapt
from pointewa.compression.gradients import GradientExchange
from pointewa.compression.hooks import activations, kept_bytes

__all__ = ["GradientExchange", "activations", "adapt", "kept_bytes"]
