"""Point transformers: dense, and unaware of experts."""

from pointewa.models.classifier import PointTransformerClassifier
from pointewa.models.dvae import TOKENIZERS, DiscreteVAE, TokenizerSizes
from pointewa.models.foreign import LoadReport, load_weights
from pointewa.models.fuse import fuse_batch_norm
from pointewa.models.masked_autoencoder import MaskedAutoencoder, Reconstruction
from pointewa.models.mixed_precision import in_precision
from pointewa.models.parts import Parts
from pointewa.models.point_bert import PointBert
from pointewa.models.presets import PRESETS, Architecture
from pointewa.models.segmenter import PointTransformerSegmenter

__all__ = [
    "PRESETS",
    "TOKENIZERS",
    "Architecture",
    "DiscreteVAE",
    "LoadReport",
    "MaskedAutoencoder",
    "Parts",
    "PointBert",
    "PointTransformerClassifier",
    "PointTransformerSegmenter",
    "Reconstruction",
    "TokenizerSizes",
    "fuse_batch_norm",
    "in_precision",
    "load_weights",
]
