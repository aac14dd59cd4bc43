"""Other people's implementations of the same classifier, with the same weights, for `benchmarks.bench`."""

import copy
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import Aside, interleave
from pointewa.errors import ConfigError, first_line
from pointewa.models import Architecture
from pointewa.models.foreign.torch_pointcloud import arguments, to_theirs
from pointewa.models.patch_embed import make_patches

TOLERANCE = 1e-3  # largest difference of logits relative to their spread, in float32


def measure(
    ours: nn.Module,
    batch: tuple[Tensor, Tensor],
    steps: Mapping[str, Callable[[], object]],
    lowered: Callable[[nn.Module], dict[str, nn.Module]],
    budget: float,
    aside: bool,
) -> dict[str, dict[str, Any]]:
    """Times of torch-pointcloud's classifier with the weights of ours, beside ours.

    Args:
        ours: a dense classifier.
        batch: clouds ``[B, N, 3]`` and labels ``[B]``, on the device.
        steps: training steps of ours.
        lowered: from a model to those in other precisions.
        budget: seconds in all.
        aside: run theirs in a process of its own, without our settings of the memory, as its users do.

    Raises:
        ConfigError: it is not installed.
        CheckpointError: it builds no such model.
        RuntimeError: its logits are not ours.
    """
    arch, plain, points = ours.architecture, copy.deepcopy(ours).eval(), batch[0]
    state = {name: value.detach().cpu().clone() for name, value in ours.state_dict().items()}
    theirs = torch_pointcloud_model(arch, state, ours.num_classes).to(points.device)
    rows: dict[str, Any] = {"logits": {"largest difference, of their spread": check(theirs, plain, points[:4])}}
    of_peer, peer = (arch, state, ours.num_classes, batch), name()
    part = Aside(torch_pointcloud, *of_peer).part if aside else torch_pointcloud(*of_peer).__getitem__
    models = {"float32": plain} | lowered(plain)
    for what, clouds in (("step", points), (f"batch {len(points)}", points), ("batch 1", points[:1])):
        run = {one: torch.inference_mode()(lambda m=model, p=clouds: m(p)) for one, model in models.items()}
        runs = {peer: part(what)} | dict(steps if what == "step" else run)
        times = interleave(runs, budget / 3, points.device)
        rows |= {f"{what}, {one}": times.row(one, [peer]) for one in runs}
    return rows


def torch_pointcloud(
    arch: Architecture, state: Mapping[str, Tensor], num_classes: int, batch: tuple[Tensor, Tensor]
) -> dict[str, Callable[[], object]]:
    """torch-pointcloud's classifier: a training step, and inference of a batch and of a single cloud.

    Its sampling and neighbours are kernels of pyg-lib; where that is missing, it is given ours.

    Args:
        arch: of the model.
        state: its weights by our names.
        num_classes: size of the output.
        batch: clouds ``[B, N, 3]`` and labels ``[B]``, on the device.
    """
    model, (points, labels) = torch_pointcloud_model(arch, state, num_classes).to(batch[0].device), batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)

    def step() -> None:
        loss = F.cross_entropy(logits_of(model.train(), points), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()

    return {
        "step": step,
        f"batch {len(points)}": torch.inference_mode()(lambda: logits_of(model.eval(), points)),
        "batch 1": torch.inference_mode()(lambda: logits_of(model.eval(), points[:1])),
    }


def torch_pointcloud_model(arch: Architecture, state: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    """Their model with our weights.

    Raises:
        ConfigError: the package is missing.
        CheckpointError: it builds no such model.
    """
    need()
    import torch_pointcloud.models as theirs
    from torch_pointcloud.models import point_bert, point_mae

    weights, (name, values) = to_theirs(state, arch), arguments(arch)
    model = getattr(theirs, name)(0, num_classes, **values)
    model.load_state_dict(weights)
    if not has_operators():
        point_mae.group = point_bert.group = _group
    return model


def need() -> None:
    """See to it that torch-pointcloud can be imported.

    Raises:
        ConfigError: saying what to do.
    """
    try:
        importlib.import_module("torch_pointcloud.models")
    except ImportError as error:
        raise ConfigError(
            f"--peer torch-pointcloud: not installed ({first_line(error)}): pip install torch-pointcloud "
            "torch-geometric"
        ) from error


def has_operators() -> bool:
    """Whether torch-pointcloud's own sampling and neighbours run here."""
    from torch_pointcloud.ops.cluster import group

    try:
        group(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64), 2, 2)
    except (ImportError, RuntimeError, AttributeError, OSError):
        return False
    return True


def logits_of(model: nn.Module, points: Tensor) -> Tensor:
    """Of clouds ``[B, N, 3]``, which it takes packed: ``[B, C]``."""
    clouds = torch.arange(len(points), device=points.device).repeat_interleave(points.shape[1])
    return model(None, points.flatten(0, 1), clouds)


def check(model: nn.Module, ours: nn.Module, points: Tensor) -> float:
    """The largest difference of logits, relative to their standard deviation.

    Raises:
        RuntimeError: more than `TOLERANCE`: they do not compute the same.
    """
    with torch.inference_mode():
        expected, found = ours.eval()(points), logits_of(model.eval(), points)
    difference = ((found - expected).abs().max() / expected.std()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"its logits differ from ours by {difference:.1e} of their spread: not the same model")
    return difference


def name() -> str:
    """What its rows are called."""
    beside = "" if has_operators() else ", with our sampling and neighbours"
    return f"torch-pointcloud {version('torch-pointcloud')}{beside}"


def _group(
    pos: Tensor, batch: Tensor, num_groups: int, group_size: int, random_start: bool = False
) -> tuple[Tensor, Tensor]:
    cut = make_patches(pos.unflatten(0, (int(batch[-1]) + 1, -1)), num_groups, group_size, check_finite=False)
    return cut.patches, cut.centers
