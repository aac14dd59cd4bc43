"""The surgery that `torch.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer`` need.

They keep their FFN in pieces, and the encoder's fused inference path reads ``linear1.weight`` and hands nested tensors
from layer to layer. So the whole MoE takes the place of ``linear1`` and identities that of the other pieces, the fused
path is closed by the flags it looks at, and `fold` puts all of them back.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from pointewa.ewa.experts import MixtureOfExperts, RandomPartitionMoE, moe_layers

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class EncoderLayerFFN(nn.Module):
    """The FFN of one of torch's layers as one module."""

    PIECES = ("linear1", "activation", "dropout", "linear2")

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in self.PIECES:
            setattr(self, name, getattr(layer, name))
        self.fused_activation = getattr(layer, "activation_relu_or_gelu", None)  # a decoder has no fused path
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D] -> [..., D]``."""
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


def put_moe(layer: nn.Module, moe: MixtureOfExperts) -> None:
    """Put a mixture made of the layer's `EncoderLayerFFN` in the place of its pieces."""
    _set_pieces(layer, [moe, nn.Identity(), nn.Identity(), nn.Identity()])
    if hasattr(layer, "activation_relu_or_gelu"):
        layer.activation_relu_or_gelu = 0


def close_nested_path(model: nn.Module) -> None:
    """Keep encoders that have MoE layers, which take no nested tensors, from handing them on."""
    for encoder in _encoders(model):
        if moe_layers(encoder):
            encoder._dense_use_nested_tensor, encoder.use_nested_tensor = encoder.use_nested_tensor, False


def fold_encoder_layers(model: nn.Module) -> None:
    """Undo `put_moe` in all layers, with the experts' mean weights, and `close_nested_path`."""
    for encoder in _encoders(model):
        if hasattr(encoder, "_dense_use_nested_tensor"):
            encoder.use_nested_tensor = encoder._dense_use_nested_tensor
            del encoder._dense_use_nested_tensor
    for layer in model.modules():
        if isinstance(layer, LAYERS) and isinstance(layer.linear1, RandomPartitionMoE):
            ffn = layer.linear1.fuse()
            _set_pieces(layer, [getattr(ffn, name) for name in ffn.PIECES])
            if ffn.fused_activation is not None:
                layer.activation_relu_or_gelu = ffn.fused_activation


def _set_pieces(layer: nn.Module, pieces: Iterable) -> None:
    for name, piece in zip(EncoderLayerFFN.PIECES, pieces, strict=True):
        if name == "activation":  # it changes between a function and a module, which setattr alone refuses
            delattr(layer, name)
        setattr(layer, name, piece)


def _encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
