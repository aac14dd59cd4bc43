"""Data modules: ``load`` gives a split of a data set as one tensor of clouds in farthest-point order."""

from datasets.base import PointClouds
from datasets.registry import NAMES, load

__all__ = ["NAMES", "PointClouds", "load"]
