"""Weights of other codebases: Point-BERT's and Point-MAE's own files, and those of the package torch-pointcloud."""

from pointewa.models.foreign.loading import LoadReport, classifier_state, load_weights

__all__ = ["LoadReport", "classifier_state", "load_weights"]
