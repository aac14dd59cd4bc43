"""Data modules: ``load`` gives a split of a data set, each cloud in farthest-point order."""

from pointewa.datasets.base import Clouds, PointClouds
from pointewa.datasets.registry import NAMES, load, open_source

__all__ = ["NAMES", "Clouds", "PointClouds", "load", "open_source"]
