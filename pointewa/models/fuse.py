"""Batch norms that are folded into the layers before them, for inference."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pointewa.models.classifier import PointTransformerClassifier


def fuse_batch_norm(model: PointTransformerClassifier) -> PointTransformerClassifier:
    """A copy in which each batch norm is part of the convolution or linear layer before it: the same function in
    evaluation mode for fewer passes over memory. It cannot be trained, and lacks the batch norms' parameters.

    Args:
        model: in evaluation mode.

    Raises:
        ValueError: in training mode, in which a batch norm is no fixed function.
    """
    if model.training:
        raise ValueError("fuse_batch_norm needs a model in evaluation mode: call model.eval() first")
    model = copy.deepcopy(model)
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for number in range(1, len(layers)):
            if isinstance(layers[number], nn.BatchNorm1d):
                before = layers[number - 1]
                fuse = fuse_linear_bn_eval if isinstance(before, nn.Linear) else fuse_conv_bn_eval
                layers[number - 1], layers[number] = fuse(before, layers[number]), nn.Identity()
    return model
