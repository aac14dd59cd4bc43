"""Folding batch norms into the layers before them, for inference."""

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

Model = TypeVar("Model", bound=nn.Module)


def fuse_batch_norm(model: Model) -> Model:
    """A copy in which each batch norm of an `nn.Sequential` is part of the convolution or linear layer before it.

    It computes the same function as the model in evaluation mode with fewer passes over memory. It cannot be trained
    as before, and lacks these batch norms' parameters. The batch norms of a segmenter's decoder stay, but for that of
    ``label_conv``: they stand beside their convolutions, not behind them. A model without batch norms is just copied.

    Args:
        model: of any kind, in evaluation mode.

    Raises:
        ValueError: the model is in training mode, in which a batch norm is not a fixed function.
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
