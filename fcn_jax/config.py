"""Frozen dataclasses that describe a run: one per topic, no logic, no arrays; ``training.config_checks`` checks them.

A recipe (``recipes.py``) is a value of ``Config``; the command line overrides single fields of it; the resolved value
is written to ``RUN/config.json`` and read back by evaluation and prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Which network; the fields after ``width`` apply to some families only (None: the family's own default)."""

    name: str = "fcn8s"
    """A name from the catalogue; an unknown one lists them."""
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19", "resnet50", "resnet101"] | None = None
    """The ResNets belong to `dilated`, whose names say which."""
    encoder_norm: Literal["batch"] | None = None
    """Batch norm after each encoder convolution, as torchvision's vgg16_bn has it."""
    width: float = 1.0
    """Multiplies every channel count of the encoder (and of what is built on it)."""
    fc_features: int | None = None
    """Channels of fc6 and fc7; by default 4096 x width."""
    fc6_kernel: int | None = None
    head_features: int | None = None
    pool: Literal["ceil", "floor"] | None = None
    crop: tuple[int, int, int] | None = None
    """Crop offsets in pixels at pool4, at pool3 and at the output (`pad100`)."""
    dropout: Literal["element", "channel"] | None = None
    dropout_rate: float | None = None
    skip_scales: tuple[float, float] | None = None
    """Factors on pool4 and pool3 before their score layers ('at once')."""
    skip_bias: bool | None = None
    upsample_bias: bool | None = None
    aux_head: bool | None = None
    freeze_stages: int = 0
    """Keep so many stages of the encoder, from the image on, as they are: no update, no gradient, batch norm by its
    running statistics. 5 is the whole encoder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in; parameters and loss stay in float32."""
    precision: Literal["default", "high", "highest"] | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and what is done to them before the network sees them."""

    train: str = "shapes/train"
    """DATASET/SPLIT to train on."""
    val: str = "shapes/val"
    """DATASET/SPLIT to validate on."""
    dir: str | None = None
    """Folder that holds the extracted data set; `shapes` needs none."""
    classes: str | None = None
    """`folder` and `tfds`: a text file with one class name per line, and its colour, as in road #804080 (by default
    DIR/classes.txt)."""
    mask_values: tuple[int, ...] | None = None
    """`folder` only: the value of each class in the masks, in the order of classes.txt, as in 0 255; by default its
    number, and 255 is ignored."""
    val_fraction: float | None = None
    """`folder` only: draw this fraction of DIR/images as val, and the rest as train."""
    split_seed: int = 0
    """Of that draw."""
    download: bool = False
    """Fetch the data set into `dir` where it is not there (voc, sbd)."""
    cache_dir: str = "~/.cache/fcn_jax"
    """Where prepared (ArrayRecord) copies are kept."""
    preprocessing: Literal["imagenet", "caffe"] = "imagenet"
    """RGB mean/std of ImageNet in [0, 1], or BGR minus the Caffe mean in [0, 255]; it belongs to the weights."""
    channels: int | None = None
    """`folder` only: number of channels of images that are not 8-bit RGB: of 8 or 16 bits, also TIFF and .npy
    (h, w, c). They are standardised by `mean` and `std` in the place of `preprocessing`."""
    mean: tuple[float, ...] | None = None
    """Of each channel, in the images' own units; by default that of the training split."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; by default that of the training split."""
    bits: int | None = None
    """Of a sample, 8 or 16; by default those of the training split."""
    input_size: tuple[int, int] | None = None
    """Height and width every image is resized to before the network; scores stay at the labels' own size."""
    crop_size: tuple[int, int] | None = None
    """Height and width of a training crop, padded with ignored pixels where the image is smaller; None: no crop."""
    base_size: int | None = None
    """Training images are first resized so that their shorter side has this many pixels; None: they keep their size."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random scale in training, times the base size or the image's own."""
    eval_multiple: int = 64
    """Where a set has images of many sizes, evaluation lays them into arrays whose sides are multiples of this, itself
    a multiple of 32, so that few are compiled; the logits stay each image's own. 1: every size is compiled."""
    flip: bool = True
    """Mirror left-right with probability 1/2 in training."""
    jitter: float = 0.0
    """Strength of the random brightness, contrast and saturation in training; 0.2 means factors in [0.8, 1.2]."""
    unreadable: Literal["error", "skip"] = "error"
    """Images and masks that are not there or cannot be read: stop, or leave them out and say how many."""
    workers: int = 0
    """Processes that decode and augment (0: threads of the training process); the batches are the same for
    every number."""
    shapes_size: tuple[int, int] = (96, 96)
    """`shapes` only: height and width of the generated images."""
    shapes_count: int = 2048
    """`shapes` only: number of generated training images."""


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    kind: Literal["softmax", "sigmoid", "focal", "dice", "lovasz"] = "softmax"
    """Softmax cross-entropy over classes; sigmoid binary cross-entropy averaged over pixels and classes; focal loss of
    the softmax (gamma 2); soft Dice or Lovasz-softmax of each image, averaged over the classes in its truth."""
    terms: tuple[str, ...] = ()
    """A weighted sum of these, NAME:FACTOR, in the place of `kind`, as in softmax:1 dice:0.5."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean over the valid pixels of the global batch, or their sum (the paper)."""
    class_weights: Literal["none", "median"] | tuple[float, ...] = "none"
    """`median`: median-frequency balancing from the training labels."""
    weight_power: float = 1.0
    """Exponent on those weights: 1 balances the classes in full, 0.5 half-way between that and no weights."""
    hard_fraction: float = 1.0
    """Keep this fraction of each image's valid pixels, those of the largest loss."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss, where the model has one."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its schedule and per-parameter multipliers."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum and coupled weight decay, or AdamW with decoupled decay (first moment `momentum`, second
    0.999)."""
    lr: float = 1e-2
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    bias_lr: float = 1.0
    """Factor on the learning rate of biases (2 in the paper)."""
    bias_decay: bool = True
    """Whether biases and batch-norm parameters decay (not in the paper)."""
    head_lr: float = 1.0
    """Factor on the learning rate of everything but the encoder (10 in Tramac's recipe)."""
    freeze_upsampling: bool = False
    """Keep the k = 2s transposed convolutions at their bilinear start."""
    schedule: Literal["fixed", "poly", "step"] = "fixed"
    poly_power: float = 0.9
    step_every: float = 0.4
    """`step`: fraction of the run after which the rate is divided by ten, again and again."""
    warmup_steps: int = 0
    clip_norm: float | None = None
    """Clip the global gradient norm at this."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, on what, how often."""

    batch_size: int = 16
    """Images in a step, over all devices and all accumulated parts."""
    accumulate: int = 1
    """Split each batch into this many parts, computed one after the other."""
    epochs: float | None = None
    steps: int | None = None
    """Length of the run; `steps` wins over `epochs`."""
    eval_every: float = 1.0
    """Epochs between two validations; the last step is always followed by one."""
    eval_batch_size: int = 8
    log_every: int = 10
    """Steps over which the logged loss is averaged."""
    keep_last: int = 2
    """Newest checkpoints kept, beside the best."""
    keep_every: float | None = None
    """Also keep a checkpoint every so many epochs for good."""
    pictures_every: int | None = None
    """Write a picture of labels and predictions every so many training steps."""
    remat: bool = False
    """Recompute each encoder stage in the backward pass instead of storing it."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Where the loss or its gradient is infinite or NaN the update is not made; then the run stops, or goes on and
    counts the step as skipped."""
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: str = "runs/shapes"
    """Folder of the run; the same command again resumes what is in it."""
    parallel: Literal["pmap", "mesh"] = "pmap"
    """Run the step under jax.pmap, or under jit on a mesh; the numbers are the same."""
    mesh: str | None = None
    """Axes of a mesh, as in data=4,space=2: `data` and `fsdp` split the batch, `fsdp` parameters and momentum as well,
    `space` the height of the images. In the place of `parallel` and `devices`."""
    devices: int | None = None
    """Number of devices to use, over all processes; by default all."""
    distributed: str | None = None
    """Train in several processes, each started with the same command: `auto` where SLURM, a TPU pod, Kubernetes or Open
    MPI tells each its place; elsewhere HOST:PORT of process 0, with `num_processes` and `process_id`."""
    num_processes: int | None = None
    """Number of processes, with `distributed` HOST:PORT."""
    process_id: int | None = None
    """Which process this is, from 0; process 0 writes and prints."""
    init: str | None = None
    """Start from these weights: a .safetensors, .pth or .caffemodel file, hf://OWNER/REPO, or a name of `fcn-jax
    models`; they have to fill all that their layout has, or the encoder where they hold nothing else. By default from
    scratch."""
    init_from: str | None = None
    """Start from another network of the family, say of a longer stride or with other classes: a run's folder, or what
    `init` takes. What has the same name is carried over, and what is new is said. In the place of `init`."""
    profile: tuple[int, int] | None = None
    """First and last step to trace into RUN/profile, for TensorBoard's profiler (`pip install xprof`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
