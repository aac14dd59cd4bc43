"""Point operators: farthest point sampling, nearest neighbours, grouping, interpolation, the Chamfer distance,
normalisation, the order of points, the up axis.

Sampling and neighbours go by float32 distances, also inside autocast and for inputs of another precision. pytorch3d's
kernels do the work if they are installed, plain torch otherwise; the environment variable ``POINTEWA_OPS``
(``pytorch3d`` or ``torch``) overrides that choice.
"""

from pointewa.ops.backend import backend
from pointewa.ops.chamfer import chamfer_distance, chamfer_l1
from pointewa.ops.fps import farthest_point_sample
from pointewa.ops.group import group
from pointewa.ops.interpolate import interpolate
from pointewa.ops.knn import knn
from pointewa.ops.normalize import flaw, placed, unit_sphere
from pointewa.ops.order import canonical_order, distinct
from pointewa.ops.up_axis import UP_AXES, UP_WORDS, turn_up, up_word

__all__ = [
    "UP_AXES",
    "UP_WORDS",
    "backend",
    "canonical_order",
    "chamfer_distance",
    "chamfer_l1",
    "distinct",
    "farthest_point_sample",
    "flaw",
    "group",
    "interpolate",
    "knn",
    "placed",
    "turn_up",
    "unit_sphere",
    "up_word",
]
