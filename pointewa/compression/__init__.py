"""Training in few bits: activations between the forward and the backward pass, gradients between processes.

For any model and loop; imports torch only.
"""

from pointewa.compression.activations import activations, kept_bytes

__all__ = ["activations", "kept_bytes"]
