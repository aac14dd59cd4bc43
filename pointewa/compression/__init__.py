"""Training in few bits: activations between the forward and the backward pass, gradients between processes.

For any model and loop; imports torch only.
"""

from pointewa.compression.activations import activations, kept_bytes
from pointewa.compression.adaptive import adapt
from pointewa.compression.gradients import GradientExchange

__all__ = ["GradientExchange", "activations", "adapt", "kept_bytes"]
