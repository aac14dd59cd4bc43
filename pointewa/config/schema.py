"""The keys of the configuration, their defaults and meanings."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

AtLeastOne = Annotated[int, Field(ge=1, lt=2**63)]
AtLeastTwo = Annotated[int, Field(ge=2, lt=2**63)]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]


@dataclass
class DataConfig:
    """The clouds, and how they are presented."""

    name: str = "shapes"
    root: str = "data"  # folder or file
    variant: str | None = (
        None  # ScanObjectNN: obj_bg, pb_t50_rs/split2; others: a fold, a layout or the up axis, see docs/data.md
    )
    num_points: AtLeastOne = 1024
    img_size: AtLeastOne = 32  # side in pixels, of a set of images
    # centred and scaled to largest norm 1; centred, in their own units; as they come; auto: as is usual for the set
    normalize: Literal["auto", "unit_sphere", "center", "none"] = "auto"
    background: Literal["drop", "keep"] = "keep"  # of ScanObjectNN's objects; "drop" removes its points
    augment: Any = field(
        default_factory=lambda: ["scale_shift"]
    )  # applied in order; also scale_shift_uniform, rotate_up, jitter, dropout; of images: crop, flip
    stream: Any = "auto"  # leave the points on disk: true, false; auto: where they would fill the device's memory
    val_fraction: Fraction = 0.0  # of each class of the training split, held out for every choice; fixed objects
    train_fraction: PositiveFraction = (
        1.0  # of each class of the training split, used for training; the same objects for every seed
    )
    # Few-shot, all three or none, see docs/tasks.md: train on `shot` objects of each of `way` classes, test on 20.
    way: AtLeastTwo | None = None
    shot: AtLeastOne | None = None
    fold: Natural | None = None  # which classes and objects; the same ones for every seed

    def __post_init__(self) -> None:
        if isinstance(self.augment, str):  # version 0.1 had only one
            self.augment = [] if self.augment == "none" else [self.augment]
        if self.variant == "False":  # YAML takes off, a layout of ModelNet40, for false
            self.variant = "off"


@dataclass
class ModelConfig:
    """A preset and its overrides (None: the preset's own value)."""

    preset: str = "tiny"  # or "timm:NAME", a ViT of timm's for images
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    num_groups: int | None = None
    group_size: int | None = None
    patch_out: int | None = None  # the patch encoder's output; if it is not `width`, reduce_dim follows
    drop_path: float | None = None
    mask_ratio: float = 0.6  # of the patches, in masked autoencoding
    decoder_depth: int = 4  # blocks of the decoder, in masked autoencoding
    patch_size: int | None = None  # side in pixels, of the patches of an image
    head: str | None = None  # "point_mae", "point_bert" or "linear"
    codebook_size: int | None = None  # codes of a tokenizer, a multiple of 4
    decoder: str | None = None  # of part segmentation: "point_mae", "point_bert" or "light"


@dataclass
class MoeConfig:
    """Which FFNs are mixtures of experts during training, and how tokens reach the experts."""

    router: Literal["auto", "none", "random", "top_k"] = "auto"  # random partition, then fold; top_k: learned,
    # and the experts stay (the naive MoE); auto: random with ewa.enabled, else none (the dense model)
    num_experts: AtLeastOne = 4
    layers: Any = "every_other"  # or "all", or a list of block numbers
    top_k: AtLeastOne = 1  # experts per token, with the learned router
    balance: NonNegative = 0.01  # weight of that router's load-balancing loss
    # copies of the FFN, or independent; auto: copies with init_from; mean, as a control: no experts, but the dense
    # model that starts from the mean of num_experts independent ones
    init: Literal["auto", "copy", "independent", "mean"] = "auto"
    scope: Literal["batch", "sample"] = "batch"  # of the random partition: the tokens of a batch, or of each sample
    dropout: Fraction = 0.0  # on what experts of the random partition are given: 0 for the first ... this for the last


@dataclass
class EwaConfig:
    """Experts Weights Averaging: the experts are averaged towards each other after every optimizer step."""

    enabled: bool = True
    share_rate: float = 0.3  # b of Eq. 6, or the value that it rises to
    schedule: Literal["constant", "linear"] = "linear"
    rise: PositiveFraction = 1.0  # fraction of the training over which the linear one rises
    until: float = 1.0  # fraction of the training after which averaging stops


@dataclass
class TrainConfig:
    """The training recipe. Defaults: Point-BERT's and Point-MAE's for ModelNet40."""

    task: str = "classification"  # what is learned: a module of pointewa/tasks
    epochs: AtLeastOne = 300
    batch_size: AtLeastOne = 32  # over all processes
    accumulate: AtLeastOne = 1  # parts in which a batch is processed, to save memory
    # of the optimizer, on the same gradients; 2: one before they are clipped and one after, as published part
    # segmentations were trained
    steps_per_batch: Literal[1, 2] = 1
    activation_checkpointing: bool = False  # keep less for the backward pass and recompute it: exact, slower
    # muon: for the matrices in the blocks, AdamW for the rest; adamw8bit: with moments in 8 bits, by torchao
    optimizer: Literal["adamw", "muon", "sgd", "adamw8bit"] = "adamw"
    lr: NonNegative = 5e-4
    min_lr: NonNegative = 1e-6  # where the warm-up starts and the cosine ends
    warmup_epochs: NonNegative | None = None  # None: by warmup_fraction; not both
    warmup_fraction: Fraction | None = None  # of the epochs; None: a thirtieth, the usual 10 of 300
    betas: list[Fraction] = field(default_factory=lambda: [0.9, 0.999])  # of AdamW
    momentum: Fraction = 0.9  # of SGD and Muon
    weight_decay: NonNegative = 0.05
    clip_norm: NonNegative = 10.0  # 0: no clipping
    label_smoothing: Fraction = 0.0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16 where the hardware computes in it
    compile: bool = False
    seed: Natural = 0
    device: str = "auto"
    save_every: Any = "15min"  # between checkpoints within an epoch: iterations or minutes; 0: only at its end
    max_skipped: Natural = 10  # steps of a run that may be skipped because the loss or a gradient was non-finite
    init_from: str | None = None  # weights to start from: a run, or a checkpoint of ours, Point-MAE or Point-BERT
    layer_decay: PositiveFraction = 1.0  # factor of the learning rate from each block to the one before it
    freeze_backbone: bool = False  # train the head only (probing)
    ema_decay: Fraction = 0.0  # of an exponential moving average of the weights, evaluated in their place; 0: none


@dataclass
class CompressConfig:
    """Training in few bits, see docs/compression.md; 32: as it is."""

    activations: Literal[2, 4, 8, 16, 32] = 32  # bits of what is kept for the backward pass
    attention: Literal[2, 4, 8, 16, 32] = 8  # of queries, keys, values and attention, where activations are compressed
    stochastic: bool = False  # round at random, right on average
    adaptive: bool = False  # bits of each tensor by its measured effect on the gradient; `activations` is the average
    gradients: Literal[4, 8, 32] = 32  # bits of the gradients between processes
    error_feedback: bool = False  # add to a gradient what the quantisation of the one before it left out


@dataclass
class TaskConfig:
    """What only some tasks know; each names the tasks."""

    tokenizer: str | None = None  # masked_point_modeling: the run of a tokenizer, or Point-BERT's dVAE.pth
    mask_ratio: list[Fraction] = field(default_factory=lambda: [0.25, 0.45])  # masked_point_modeling: limits of the
    # fraction of the patches, drawn for each cloud
    mask_rand: bool = False  # masked_point_modeling: mask each patch by itself, not a block of neighbours
    queue_size: AtLeastOne = 16384  # masked_point_modeling: keys of former batches in the contrast
    moco_loss: bool = False  # masked_point_modeling: add the contrast of clouds that are not mixed
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.07  # masked_point_modeling: of the contrasts
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999  # masked_point_modeling: of the encoder of the keys


@dataclass
class RunConfig:
    """The run folder."""

    name: str | None = None  # None: composed of the data set, model, scheme and seed
    dir: str = "runs"
    overwrite: bool = False  # start over instead of resuming an unfinished run of this name
    tracker: Literal["none", "wandb", "mlflow", "trackio"] = "none"  # beside TensorBoard, if it is installed
    report: bool = True  # write the run's page at the end, and clouds, features, confusion matrix to TensorBoard


@dataclass
class Config:
    """The whole configuration."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoeConfig = field(default_factory=MoeConfig)
    ewa: EwaConfig = field(default_factory=EwaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def router(self) -> str:
        """How tokens reach the experts: "random" or "top_k"; "none" for a dense model."""
        if self.moe.router == "auto":
            return "random" if self.ewa.enabled else "none"
        return self.moe.router

    @property
    def scheme(self) -> str:
        """The scheme in a word, for names: dense; rup, ewa (random partition without and with averaging); moe,
        moe_ewa (behind a router)."""
        names = {"none": "dense", "random": "ewa" if self.ewa.enabled else "rup"}
        return names.get(self.router, "moe_ewa" if self.ewa.enabled else "moe")
