"""One training loop for dense and EWA models, evaluation, checkpoints, run folders."""

from pointewa.engine.checkpoint import load_foreign, load_model, save_model
from pointewa.engine.description import LoadedModel
from pointewa.engine.evaluate import Evaluation, evaluate
from pointewa.engine.pretrain import MaskedPretraining
from pointewa.engine.trainer import Data, Trainer

__all__ = [
    "Data",
    "Evaluation",
    "LoadedModel",
    "MaskedPretraining",
    "Trainer",
    "evaluate",
    "load_foreign",
    "load_model",
    "save_model",
]
