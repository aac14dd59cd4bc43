"""What is known of the published weights of Point-BERT and Point-MAE, which their files do not say.

Names and values are those that the package torch-pointcloud (0.0.18) registers; the files are its conversions of the
authors' own. The clouds of both sets have y up.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

from pointewa.models.presets import PRESETS, Architecture

MODELNET40 = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip
SCANOBJECTNN = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published model.

    Args:
        architecture: of the model.
        num_points: of a cloud, a farthest point sample where there are more.
        normalize: see `pointewa.runs.description.LoadedModel`.
        dataset: what it was trained on.
        variant: of the data set, as ``data.variant`` has it; None where that does not matter.
        class_names: in the order of the head's outputs; none for a pre-training.
        kind: "classifier", "masked_autoencoder", or "" for a pre-training of which only the encoder is used here.
    """

    architecture: Architecture
    num_points: int
    normalize: str
    dataset: str = "modelnet40"
    variant: str | None = None
    class_names: tuple[str, ...] = MODELNET40
    kind: str = "classifier"

    def description(self) -> dict[str, Any]:
        """As a model file has it beside it."""
        masked = self.kind == "masked_autoencoder"
        return {
            "model": self.kind,
            "architecture": asdict(self.architecture),
            **({"mask_ratio": 0.6, "decoder_depth": 4} if masked else {}),
            "class_names": list(self.class_names),
            "num_points": self.num_points,
            "dataset": self.dataset,
            "normalize": self.normalize,
            "up": "y",
            "task": "masked_autoencoding" if masked else "classification",
        }


def _table() -> dict[str, Published]:
    mae, bert = PRESETS["point_mae"], PRESETS["point_bert"]
    table = {}
    for tag, points, groups in (("", 1024, 64), ("-4k", 4096, 256), ("-8k", 8192, 512)):
        name = f"point-bert-base.modelnet40{tag}.xumin-yu"
        table[name] = Published(replace(bert, num_groups=groups), points, "unit_sphere")
        if tag != "-4k":
            name = f"point-mae-base.modelnet40{tag}.yatian-pang"
            table[name] = Published(replace(mae, num_groups=groups), points, "unit_sphere_of_sample")
    for tag, variant in (("objbg", "obj_bg"), ("objonly", "obj_only"), ("hardest", "pb_t50_rs")):
        scans = ("none", "scanobjectnn", variant, SCANOBJECTNN)
        table[f"point-bert-base.scanobjectnn-{tag}.xumin-yu"] = Published(bert, 1024, *scans)
        table[f"point-mae-base.scanobjectnn-{tag}.yatian-pang"] = Published(replace(mae, num_groups=128), 2048, *scans)
    # Their code draws the points of a cloud before it centres and scales them.
    shapes = (1024, "unit_sphere_of_sample", "shapenet55", None, ())
    table["point-mae-base.pretrain.yatian-pang"] = Published(mae, *shapes, "masked_autoencoder")
    table["point-bert-base.pretrain.xumin-yu"] = Published(bert, *shapes, "")
    return table


PUBLISHED = _table()


def published_name(path: PurePath) -> str | None:
    """The published model that a path names by its file or a folder, as the caches of downloads do; else None."""
    for part in reversed(path.parts):
        name = part.removesuffix(".safetensors").rpartition("--")[2]  # huggingface_hub's: models--owner--name
        if name in PUBLISHED:
            return name
    return None
