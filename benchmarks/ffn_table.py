"""Which FFNs `pointewa.ewa.find_ffns` finds in other people's transformers: the table of docs/method.md.

python -m benchmarks.ffn_table               # prints it
python -m benchmarks.ffn_table --write       # puts it into docs/method.md
"""

import argparse
import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import mlp_mixer
from timm.models.mvitv2 import MultiScaleVitCfg
from torch import Tensor, nn
from torchvision.models import swin_transformer

import pointewa.ewa as ewa

PAGE = Path(__file__).parents[1] / "docs/method.md"
START, END = "<!-- made by python -m benchmarks.ffn_table --write -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Family:
    """One row: a small model of a family.

    Args:
        name: of the family.
        build: the model.
        inputs: one batch, as positional arguments, or by name.
        note: what is left out, and why.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Sequence[Any] | dict[str, Tensor]]
    note: str = ""


def _image(size: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(2, 3, size, size)]


def _timm(name: str, size: int = 32, note: str = "", title: str = "", **values: Any) -> Family:
    build = lambda: importlib.import_module("timm").create_model(name, num_classes=7, **values)  # noqa: E731
    return Family(f"timm `{title or name}`", build, _image(size), note)


def _built(module: str, name: str, size: int = 32, note: str = "", title: str = "", **values: Any) -> Family:
    """A class of timm's or torchvision's, where its registered models cannot be made small."""
    build = lambda: getattr(importlib.import_module(module), name)(num_classes=7, **values)  # noqa: E731
    return Family(f"{module.split('.')[0]} `{title or name}`", build, _image(size), note)


def _transformers(name: str, values: dict[str, Any], note: str = "", config: str = "", size: int = 0) -> Family:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        config_class = getattr(library, config or name.replace("Model", "Config").replace("Encoder", ""))
        return getattr(library, name)(config_class(**values))

    tokens = lambda: {"input_ids": torch.arange(10).view(2, 5) + 3}  # noqa: E731
    pixels = lambda: {"pixel_values": torch.randn(2, 3, size, size)}  # noqa: E731
    return Family(f"transformers `{name}`", build, pixels if size else tokens, note)


def _pointcloud(name: str, note: str = "", **values: Any) -> Family:
    def build() -> nn.Module:
        small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_groups": 8, "group_size": 8}
        with torch.device("cpu"):  # it reads values while it builds
            return getattr(importlib.import_module("torch_pointcloud.models"), name)(0, 7, **(small | values))

    clouds = lambda: [None, torch.randn(128, 3), torch.arange(2).repeat_interleave(64)]  # noqa: E731
    return Family(f"torch-pointcloud `{name}`", build, clouds, note)


CONV = "none: its FFNs are convolutions"
APART = "none: the two layers lie apart in the block"
POSITIONS = "not the MLPs of the relative positions"
PLAIN = {"depth": 2, "embed_dim": 48, "num_heads": 3}
STAGES = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
MAXXVIT = {"img_size": 64, "embed_dim": (32, 64), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 8}
HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
HF_VISION = {**HF, "image_size": 32, "patch_size": 16}
TORCH = {"d_model": 16, "nhead": 2, "dim_feedforward": 16, "batch_first": True}


def _tokens(count: int) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(2, 5, 16) for _ in range(count)]


FAMILIES = [
    Family(
        "torch.nn `TransformerEncoder`",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**TORCH), 2, enable_nested_tensor=False),
        _tokens(1),
        "the layer stands for its loose FFN",
    ),
    Family(
        "torch.nn `TransformerDecoder`",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**TORCH), 2),
        _tokens(2),
        "the layer stands for its loose FFN",
    ),
    Family(
        "torch.nn `Transformer`",
        lambda: nn.Transformer(**TORCH, num_encoder_layers=2, num_decoder_layers=2),
        _tokens(2),
        "the layer stands for its loose FFN",
    ),
    _timm("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48),
    _timm("vit_small_patch16_18x2_224", img_size=32, **PLAIN, title="vit, parallel branches"),
    _timm("vit_base_patch16_xp_224", img_size=32, **PLAIN,
          note="none: one layer makes the attention's and the FFN's inputs"),
    _timm("vit_giant_patch14_dinov2", 28, img_size=28, **PLAIN, title="vit, packed SwiGLU (dinov2)"),
    _timm("aimv2_large_patch14_224", 28, img_size=28, **PLAIN, title="vit, SwiGLU (aimv2)"),
    _timm("vit_base_patch16_siglip_224", note="not the MLP of the attention pooling, a head", img_size=32, **PLAIN),
    _timm("vit_relpos_small_patch16_224", note=POSITIONS, img_size=32, **PLAIN),
    _timm("eva_giant_patch14_224", 28, img_size=28, **PLAIN),
    _timm("eva02_base_patch14_224", 28, img_size=28, **PLAIN),
    _timm("naflexvit_base_patch16_gap", **PLAIN),
    _timm("beit_base_patch16_224", img_size=32, **PLAIN),
    _timm("deit3_small_patch16_224", img_size=32, **PLAIN),
    _timm("cait_xxs24_224", img_size=32, **PLAIN),
    _timm("xcit_nano_12_p16_224", img_size=32, **PLAIN, note="not the convolutions of the local patch interaction"),
    _timm("samvit_base_patch16", img_size=32, **PLAIN),
    _timm("convit_tiny", img_size=32, depth=2, embed_dim=12, local_up_to_layer=1),
    _timm("swin_tiny_patch4_window7_224", 64, **STAGES),
    _timm("swinv2_tiny_window8_256", 64, **STAGES, note=POSITIONS),
    _timm("swinv2_cr_tiny_224", 64, **STAGES, note=POSITIONS),
    _timm("davit_tiny", 64, depths=(1, 1), embed_dims=(24, 48), num_heads=(2, 4)),
    _built("timm.models.gcvit", "GlobalContextVit", 64, title="gcvit", img_size=64, embed_dim=16, depths=(1, 1, 2, 1)),
    _timm("hiera_tiny_224", 64, img_size=(64, 64), embed_dim=12, num_heads=1, stages=(1, 1, 2, 1)),
    _built("timm.models.hieradet_sam2", "HieraDet", 224, title="hieradet_sam2", embed_dim=12, stages=(1, 1, 2, 1)),
    _timm("maxvit_pico_rw_256", 64, **MAXXVIT),
    _timm("maxvit_rmlp_pico_rw_256", 64, **MAXXVIT, note=POSITIONS),
    _timm("maxxvit_rmlp_nano_rw_256", 64, **MAXXVIT, note=POSITIONS),
    _timm("coatnet_rmlp_nano_rw_224", 64, img_size=64, note=CONV),
    _built("timm.models.coat", "CoaT", 64, title="coat", img_size=64, patch_size=4, embed_dims=(16, 16, 24, 32),
           serial_depths=(1, 1, 1, 1)),
    _built("timm.models.crossvit", "CrossVit", 48, title="crossvit", img_size=48, patch_size=(8, 16),
           embed_dim=(12, 24), num_heads=(2, 2), depth=((1, 1, 1),)),
    _built("timm.models.efficientformer", "EfficientFormer", 224, title="efficientformer", num_vit=1,
           depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), note="not the convolutions of its first stages"),
    _built("timm.models.edgenext", "EdgeNeXt", 64, title="edgenext", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    _timm("mobilevit_xxs", 64),
    _timm("mobilevitv2_050", 64, note=CONV),
    _built("timm.models.nest", "Nest", 32, title="nest", img_size=32, embed_dims=(12, 24), num_heads=(2, 2),
           depths=(1, 1), num_levels=2),
    _built("timm.models.pit", "PoolingVisionTransformer", 32, title="pit", img_size=32, base_dims=(6, 6),
           depth=(1, 2), heads=(2, 4)),
    _built("timm.models.tiny_vit", "TinyVit", 64, title="tiny_vit", embed_dims=(8, 16, 24, 32), depths=(1, 1, 2, 1),
           num_heads=(1, 2, 3, 4)),
    _timm("tnt_s_patch16_224", img_size=32, depth=2, embed_dim=48,
          note="of every other, `mlp` alone: choose by number for `mlp_in`"),
    _timm("twins_pcpvt_small", 64, img_size=64, depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32),
          num_heads=(1, 2, 3, 4)),
    _built("timm.models.volo", "VOLO", 32, title="volo", img_size=32, layers=(1, 2), embed_dims=(24, 24),
           num_heads=(2, 2), downsamples=(False, False), outlook_attention=(True, False), stem_hidden_dim=8),
    _built("timm.models.qwen3_vit", "Qwen3VitClassifier", 32, title="qwen3_vit", **PLAIN),
    _built("timm.models.gemma4_vit", "Gemma4VitClassifier", 48, title="gemma4_vit", **PLAIN, head_dim=16,
           intermediate_size=64, position_embedding_size=64),
    _built("timm.models.mlp_mixer", "MlpMixer", 32, title="mixer", img_size=32, num_blocks=2, embed_dim=48,
           note="not the token-mixing MLPs: their width is not the block's"),
    _built("timm.models.mlp_mixer", "MlpMixer", 32, title="resmlp", img_size=32, num_blocks=2, embed_dim=48,
           mlp_ratio=4, block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine),
    _timm("gmlp_s16_224", img_size=32, note="none: its MLPs mix tokens in their middle"),
    _built("timm.models.sequencer", "Sequencer2d", 56, title="sequencer", img_size=56, layers=(1, 1, 1, 1),
           embed_dims=(12, 12, 12, 12), hidden_sizes=(4, 4, 4, 4)),
    _built("timm.models.mvitv2", "MultiScaleVit", 64, title="mvitv2", img_size=(64, 64),
           cfg=MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=(8, 16, 32, 64))),
    _timm("vitamin_small_224", 64, img_size=64, depth=2, note="not its convolutional stages"),
    _built("timm.models.convnext", "ConvNeXt", 64, title="convnext", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1),
           note="no attention, but repeated blocks"),
    _built("timm.models.convnext", "ConvNeXt", 64, title="convnext, `conv_mlp`", dims=(8, 16, 24, 32),
           depths=(1, 1, 1, 1), conv_mlp=True, note=CONV),
    _timm("pvt_v2_b0", 64, note=CONV),
    _timm("nextvit_small", 64, note=CONV),
    _timm("levit_128s", 64, img_size=64, note="none: its FFNs have batch norms"),
    _timm("visformer_tiny", 64, img_size=64, note=CONV),
    _timm("focalnet_tiny_srf", 64, note=CONV),
    _timm("caformer_s18", 64, note="none: their activation, StarReLU, has parameters"),
    _timm("poolformer_s12", 64, note=CONV),
    _built("torchvision.models", "VisionTransformer", 32, title="vit", image_size=32, patch_size=16, num_layers=2,
           num_heads=3, hidden_dim=48, mlp_dim=64),
    _built("torchvision.models", "SwinTransformer", 64, title="swin", patch_size=[4, 4], embed_dim=24, depths=[2, 2],
           num_heads=[2, 4], window_size=[4, 4]),
    _built("torchvision.models.swin_transformer", "SwinTransformer", 64, title="swin_v2", patch_size=[4, 4],
           embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], note=POSITIONS,
           block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2),
    _built("torchvision.models", "MaxVit", 64, title="maxvit", input_size=(64, 64), stem_channels=8, partition_size=2,
           block_channels=[32, 64], block_layers=[1, 1], head_dim=32, stochastic_depth_prob=0.0),
    _built("torchvision.models", "convnext_tiny", 64, title="convnext", note="none: its layers lie among convolutions"),
    _transformers("ViTModel", HF_VISION, size=32),
    _transformers("DeiTModel", HF_VISION, size=32),
    _transformers("BeitModel", HF_VISION, size=32),
    _transformers("Dinov2Model", HF_VISION, size=32),
    _transformers("Dinov2WithRegistersModel", {**HF_VISION, "use_swiglu_ffn": True}, size=32),
    _transformers("DINOv3ViTModel", HF_VISION, size=32),
    _transformers("CLIPVisionModel", HF_VISION, size=32),
    _transformers("SiglipVisionModel", HF_VISION, size=32, note="the attention pooling is a block: its MLP counts"),
    _transformers("SwinModel", {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": [2, 2],
                                "num_heads": [2, 4]}, size=64),
    _transformers("ViTMAEModel", HF_VISION, size=32),
    _transformers("LlamaModel", HF),
    _transformers("Qwen3Model", {**HF, "num_key_value_heads": 2, "head_dim": 16}),
    _transformers("T5EncoderModel", {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
                                     "vocab_size": 50}, config="T5Config"),
    _transformers("DistilBertModel", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 50}),
    _transformers("BertModel", HF, note=APART + " (`BertIntermediate`, `BertOutput`)"),
    _transformers("BartModel", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
                                "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                                "vocab_size": 50}, note=APART),
    _transformers("GPT2Model", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50},
                  note="none: its layers are `Conv1D`, which keep their weights transposed"),
    _pointcloud("PointMAEClassification"),
    _pointcloud("PointBERTClassification"),
    _pointcloud("PointGPTClassification"),
]  # fmt: skip


def row(family: Family, model: nn.Module) -> str:
    """A family's row in Markdown: the patterns of the names of a model's FFNs, and how many there are of each."""
    patterns = Counter(re.sub(r"\d+", "*", name) for name in ewa.find_ffns(model))
    listed = ", ".join(f"{count} x `{pattern}`" for pattern, count in patterns.items()) or "none"
    return f"| {family.name} | {listed} | {family.note.removeprefix('none: ')} |\n"


def table() -> str:
    """The table in Markdown."""
    rows = ["| model, made small | FFNs found | |\n", "|---|---|---|\n"]
    for family in FAMILIES:
        with torch.device("meta"):
            rows.append(row(family, family.build()))
    return "".join(rows)


def written(page: str) -> str:
    """The page with the table of today between its marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.ffn_table", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put it into docs/method.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(written(PAGE.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
