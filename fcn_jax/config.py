"""Frozen dataclasses that configure a run, one per topic, without logic; ``training.config_checks`` validates them.

A recipe (``recipes.py``) is a ``Config``, and the command line overrides single fields of it. The resolved config is
written to ``RUN/config.json``, which evaluation and prediction read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network. Some fields apply to some families only; None takes the family's default."""

    name: str = "fcn8s"
    """Name of the network; `fcn-jax models` lists them."""
    encoder: Literal["vgg11", "vgg13", "vgg16", "vgg19", "resnet50", "resnet101"] | None = None
    """VGG encoder, by default vgg16. The ResNets are for fcn_resnet50 and fcn_resnet101, whose names select them."""
    encoder_norm: Literal["batch"] | None = None
    """Batch norm after each encoder convolution, as in torchvision's vgg16_bn."""
    width: float = 1.0
    """Multiplier on the channel counts of the encoder and of the layers built on it."""
    fc_features: int | None = None
    """Channels of fc6 and fc7; by default 4096 x width."""
    fc6_kernel: int | None = None
    """Side of fc6's kernel, by default 7."""
    head_features: int | None = None
    """Channels of the small head (`resize`, `dilated`); by default a quarter of the encoder's output channels."""
    pool: Literal["ceil", "floor"] | None = None
    """Whether 2x2 max pooling rounds odd sides up (ceil, as Caffe) or down (floor)."""
    crop: tuple[int, int, int] | None = None
    """Crop offsets in pixels at pool4, at pool3 and at the output (`pad100`)."""
    dropout: Literal["element", "channel"] | None = None
    """Drop single activations (element, as in Caffe) or whole feature maps (channel)."""
    dropout_rate: float | None = None
    skip_scales: tuple[float, float] | None = None
    """Factors on pool4 and pool3 before their score layers, as in the reference's FCN-8s at once."""
    skip_bias: bool | None = None
    """Use a bias in the score layers of pool4 and pool3."""
    upsample_bias: bool | None = None
    """Use a bias in the transposed convolutions."""
    aux_head: bool | None = None
    """Train an auxiliary head as well (`resize`, `dilated`)."""
    freeze_stages: int = 0
    """Number of encoder stages to freeze, from the first: no gradient and no update, and batch norm uses its running
    statistics. 5 is the whole encoder."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the layers' computations; parameters and loss stay in float32."""
    precision: Literal["default", "high", "highest"] | None = None


@dataclass(frozen=True)
class DataConfig:
    """The data set, its preprocessing, and augmentation in training."""

    train: str = "shapes/train"
    """DATASET/SPLIT to train on."""
    val: str = "shapes/val"
    """DATASET/SPLIT to validate on."""
    dir: str | None = None
    """Folder that holds the extracted data set; `shapes` needs none."""
    classes: str | None = None
    """`folder` and `tfds`: a text file with one class name per line and optionally its colour, as in road #804080; by
    default DIR/classes.txt."""
    mask_values: tuple[int, ...] | None = None
    """`folder` only: mask value of each class, in the order of classes.txt, as in 0 255. By default it is the class's
    index, and 255 is ignored."""
    val_fraction: float | None = None
    """`folder` only: draw this fraction of DIR/images as val; the rest is train."""
    split_seed: int = 0
    """Random seed of the `val_fraction` draw."""
    download: bool = False
    """Download the data set into `dir` if it is missing (voc, sbd)."""
    cache_dir: str = "~/.cache/fcn_jax"
    """Folder for prepared (ArrayRecord) copies of data sets."""
    preprocessing: Literal["imagenet", "caffe"] = "imagenet"
    """imagenet: RGB in [0, 1], normalised by ImageNet's mean and std. caffe: BGR in [0, 255] minus the Caffe mean. Use
    the one that the initial weights were trained with."""
    channels: int | None = None
    """`folder` only: number of channels, for images that are not 8-bit RGB: 8 or 16 bits, also TIFF and .npy (h, w, c).
    They are standardised by `mean` and `std` instead of `preprocessing`."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, in the images' own units; by default that of the training split."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; by default that of the training split."""
    bits: int | None = None
    """Bits per sample, 8 or 16; by default those of the training split."""
    input_size: tuple[int, int] | None = None
    """Height and width to which every image is resized before the network; scores are computed at the labels' size."""
    crop_size: tuple[int, int] | None = None
    """Height and width of a training crop, padded with ignored pixels where the image is smaller; None: no crop."""
    base_size: int | None = None
    """Training images are first resized so that their shorter side has this many pixels; None: they keep their size."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random scale factor in training, relative to the base size or the image's own size."""
    eval_multiple: int = 64
    """Evaluation pads images of different sizes to multiples of this, itself a multiple of 32, so that few shapes are
    compiled; each image's logits stay the same. 1: no padding, and every size is compiled."""
    flip: bool = True
    """Mirror left-right with probability 1/2 in training."""
    jitter: float = 0.0
    """Strength of the random brightness, contrast and saturation in training; 0.2 means factors in [0.8, 1.2]."""
    unreadable: Literal["error", "skip"] = "error"
    """For images and masks that are missing or cannot be read: stop (error), or leave them out and report how many."""
    workers: int = 0
    """Number of processes that decode and augment; 0: threads of the training process. The batches do not depend on
    it."""
    shapes_size: tuple[int, int] = (96, 96)
    """`shapes` only: height and width of the generated images."""
    shapes_count: int = 2048
    """`shapes` only: number of generated training images."""


@dataclass(frozen=True)
class LossConfig:
    """The training loss."""

    kind: Literal["softmax", "sigmoid", "focal", "dice", "lovasz"] = "softmax"
    """softmax: cross-entropy over classes. sigmoid: binary cross-entropy averaged over pixels and classes. focal: focal
    loss of the softmax, gamma 2. dice, lovasz: soft Dice or Lovasz-softmax of each image, averaged over the classes in
    its labels."""
    terms: tuple[str, ...] = ()
    """Weighted sum of these losses, NAME:FACTOR, instead of `kind`, as in softmax:1 dice:0.5."""
    reduction: Literal["mean", "sum"] = "mean"
    """Mean of the loss over the valid pixels of the global batch, or its sum (as in the paper)."""
    class_weights: Literal["none", "median"] | tuple[float, ...] = "none"
    """median: median-frequency balancing computed from the training labels; or one number per class."""
    weight_power: float = 1.0
    """Exponent on the median-frequency weights: 1 balances the classes fully, 0.5 half-way to no weights."""
    hard_fraction: float = 1.0
    """Fraction of each image's valid pixels to keep, those with the largest loss (hard example mining)."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's loss, where the model has one."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its schedule and per-parameter multipliers."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum and coupled weight decay, or AdamW with decoupled decay (beta1 `momentum`, beta2 0.999)."""
    lr: float = 1e-2
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    bias_lr: float = 1.0
    """Factor on the learning rate of biases (2 in the paper)."""
    bias_decay: bool = True
    """Apply weight decay to biases and batch-norm parameters too (the paper does not)."""
    head_lr: float = 1.0
    """Factor on the learning rate of everything but the encoder (10 in Tramac's recipe)."""
    freeze_upsampling: bool = False
    """Keep transposed convolutions of kernel 2s at stride s fixed at their bilinear initialisation."""
    schedule: Literal["fixed", "poly", "step"] = "fixed"
    poly_power: float = 0.9
    step_every: float = 0.4
    """`step` only: the learning rate is divided by ten after every such fraction of the run."""
    warmup_steps: int = 0
    clip_norm: float | None = None
    """Clip the global gradient norm to this value."""


@dataclass(frozen=True)
class TrainConfig:
    """Batches, length of the run, validation and checkpoints."""

    batch_size: int = 16
    """Images per step, over all devices and all parts of gradient accumulation."""
    accumulate: int = 1
    """Gradient accumulation: split each batch into this many parts, computed one after the other."""
    epochs: float | None = None
    steps: int | None = None
    """Length of the run; takes precedence over `epochs`."""
    eval_every: float = 1.0
    """Epochs between validations; the last step is always followed by one."""
    eval_batch_size: int = 8
    log_every: int = 10
    """Steps over which the logged loss is averaged."""
    keep_last: int = 2
    """Number of newest checkpoints to keep, besides the best one."""
    keep_every: float | None = None
    """Also keep a checkpoint permanently every this many epochs."""
    pictures_every: int | None = None
    """Write a picture of labels and predictions every this many training steps."""
    remat: bool = False
    """Recompute each encoder stage's activations in the backward pass instead of storing them, to save memory."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """If the loss or its gradient is infinite or NaN, the update is discarded. The run then stops, or continues and
    counts the step as skipped."""
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    run: str = "runs/shapes"
    """Folder of the run; the same command again resumes it."""
    parallel: Literal["pmap", "mesh"] = "pmap"
    """Run the step under jax.pmap, or under jit on a mesh; both compute the same numbers."""
    mesh: str | None = None
    """Axes of a device mesh, as in data=4,space=2. `data` and `fsdp` split the batch, `fsdp` also splits parameters and
    momentum, and `space` the height of images. Replaces `parallel` and `devices`."""
    devices: int | None = None
    """Number of devices to use, over all processes; by default all."""
    distributed: str | None = None
    """Train in several processes, each started with the same command. `auto` under SLURM, Kubernetes or Open MPI, or on
    a TPU pod; elsewhere HOST:PORT of process 0, with `num_processes` and `process_id`."""
    num_processes: int | None = None
    """Number of processes, with `distributed` HOST:PORT."""
    process_id: int | None = None
    """Index of this process, from 0; process 0 writes files and prints."""
    init: str | None = None
    """Initial weights: a .safetensors, .pth or .caffemodel file, hf://OWNER/REPO, or a name of `fcn-jax models`. They
    must fill all layers of their layout, or only the encoder if they hold nothing else. By default random."""
    init_from: str | None = None
    """Initialise from another network of the same family, e.g. with a coarser stride or other classes: a run's folder,
    or whatever `init` takes. Parameters of the same name are copied, and new ones are reported. Replaces `init`."""
    profile: tuple[int, int] | None = None
    """First and last step to trace into RUN/profile, for TensorBoard's profiler (`pip install xprof`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
