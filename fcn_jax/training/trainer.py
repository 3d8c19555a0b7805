"""Build everything that a run needs from its config: data, network, initial weights, loss, optimiser, step."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fcn_jax import weights
from fcn_jax.chips import peak_of
from fcn_jax.config import Config
from fcn_jax.data.datasets import Split, load
from fcn_jax.data.pipeline import class_frequencies
from fcn_jax.data.transforms import augmented_size
from fcn_jax.devices import Parallel, check_height, groups, kernels_for, make_parallel, pick_mesh
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import Predictor, make_predictor
from fcn_jax.losses import Loss, make_loss, median_frequency_weights
from fcn_jax.models import create_model, init_variables, model_from_config, summarize
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN, ScoreFCN
from fcn_jax.optim import make_optimizer, make_schedule
from fcn_jax.paths import is_remote, to_path
from fcn_jax.preprocessing import normalize, preprocessing_of
from fcn_jax.step import AxisName, TrainState, TrainStep, make_train_step, new_state
from fcn_jax.training.config_checks import check_config, check_readers, flatten, loss_terms
from fcn_jax.training.distributed import check_same, digest, together, writer_first
from fcn_jax.training.run import open_run
from fcn_jax.weights.names import COUNTER
from fcn_jax.weights.pretrained import HUB_FILE

Notes = tuple[str, ...]


@dataclass(frozen=True)
class Length:
    """The length of a run and its intervals, in steps."""

    steps: int
    eval_every: int
    keep_every: int | None
    epoch: float

    def is_milestone(self, step: int) -> bool:
        """Whether this step is followed by a validation and a checkpoint."""
        kept = self.keep_every is not None and step % self.keep_every == 0
        return step > 0 and (step % self.eval_every == 0 or kept or step == self.steps)


@dataclass(frozen=True)
class Trainer:
    """Everything that the training loop uses."""

    config: Config
    """As given, with ``data.mean``, ``std`` and ``bits`` filled in from the training images if needed."""
    model: FCN
    train: Split
    val: Split
    length: Length
    schedule: optax.Schedule
    parallel: Parallel
    predict: Predictor
    """Runs on the devices of this process only; takes the state's variables."""
    state: TrainState
    """The initial state, placed on the devices."""
    least_step_s: float | None
    """See ``least_step_time``."""
    notes: Notes
    """Messages for the user at the start."""


# Fields that may differ between processes: data folders, workers, and the process id.
_OWN_FIELDS = ("data.dir", "data.cache_dir", "data.workers", "process_id")


def make_trainer(config: Config, resuming: bool = False) -> Trainer:
    """Prepare a run; only the prepared copy of the data is written.

    Args:
        config: the run's config.
        resuming: a checkpoint will replace the initial weights, so do not read them.

    Raises:
        InputError: the config is not valid for these data, weights and devices.
    """
    check_config(config)
    check_readers(config.data, config.data.train, config.data.val)
    check_same({name: value for name, value in flatten(config).items() if name not in _OWN_FIELDS})
    train, val = writer_first(lambda: (load(config.data.train, config.data), load(config.data.val, config.data)))
    if train.class_names != val.class_names:
        raise InputError(
            f"{config.data.train} and {config.data.val} have different classes; choose splits that share them"
        )
    if train.statistics is not None:
        names = ("mean", "std", "bits")
        found = dict(zip(names, train.statistics, strict=True))
        given = {name: getattr(config.data, name) for name in names if getattr(config.data, name) is not None}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **{**found, **given}))
        check_bits(config, train, val)
        if max(config.data.mean or ()) >= 2 ** (config.data.bits or 8):
            raise InputError(
                f"--data.mean {config.data.mean}: samples of {config.data.bits} bits are smaller; give the mean of the "
                "samples as they are stored"
            )
    mesh = pick_mesh(config.mesh, config.devices)
    unit = config.train.accumulate * groups(mesh)
    if config.train.batch_size % unit:
        raise InputError(
            f"expected a batch size that is a multiple of {unit}, of {groups(mesh)} devices x "
            f"{config.train.accumulate} parts, got {config.train.batch_size}; set --train.batch-size or --devices"
        )
    size = augmented_size(config.data, train.image_size)
    check_height((size or (None,))[0], mesh)
    length = run_length(config, len(train))
    model = model_from_config(config.model, train.num_classes, config.train.remat)
    fetched = config
    if not resuming:  # download files by name, and hash them, only once
        fetched = dataclasses.replace(config, init=_fetched(config.init), init_from=_fetched(config.init_from))
    # Orbax reads a run in all processes together.
    variables, notes = together(lambda: starting_variables(fetched, model, resuming))
    for name, file in ((config.init, fetched.init), (config.init_from, fetched.init_from)):
        notes = tuple(note.replace(file, name) if name and file else note for note in notes)
    # The same name may refer to different files in different processes.
    check_same({"training images": len(train), "validation images": len(val), "starting weights": digest(variables)})
    optimizer = make_optimizer(variables["params"], config.optim, length.steps, config.model.freeze_stages)
    loss = run_loss(config, train)
    if config.train.accumulate > 1 and "batch_stats" in variables:
        notes += ("gradient accumulation with batch norm: each part is normalised by its own statistics",)

    parallel = make_parallel_step(config, model, optimizer, loss, mesh)
    predict = make_predictor(model, preprocessing_of(config.data), parallel.mesh.local_mesh)
    return Trainer(
        config=config,
        model=model,
        train=train,
        val=val,
        length=length,
        schedule=make_schedule(config.optim, length.steps),
        parallel=parallel,
        predict=lambda variables, *rest, **options: predict(parallel.local(variables), *rest, **options),
        state=parallel.place_state(new_state(variables, optimizer, config.train.seed)),
        least_step_s=least_step_time(config, model, size, mesh),
        notes=notes,
    )


def check_bits(config: Config, *splits: Split) -> None:
    """Raise InputError if a split's images have another number of bits than the network was trained on."""
    for split in splits:
        if split.statistics is not None and split.statistics[2] != config.data.bits:
            raise InputError(
                f"{split.dataset}/{split.split} has samples of {split.statistics[2]} bits, but the network takes "
                f"{config.data.bits}; convert the images"
            )


def least_step_time(config: Config, model: FCN, size: tuple[int, int] | None, mesh: Mesh) -> float | None:
    """Return the seconds of a step if all chips ran at peak FLOP/s; None if the peak or the FLOPs are not known.

    A step counts as three times the FLOPs of the forward pass (see ``summarize``), however the gradient is computed.
    With frozen stages, which have no gradient, that would be wrong, so the result is None.
    """
    peak = peak_of(mesh.devices.flat[0])
    if peak is None or size is None or config.model.freeze_stages:
        return None
    flops = 3 * sum(layer.flops for layer in summarize(model, size)) * config.train.batch_size
    return flops / (peak * mesh.size)


def make_parallel_step(config: Config, model: FCN, optimizer: Any, loss: Loss, mesh: Mesh) -> Parallel:
    """Make the training step of a run on its devices, from 8-bit images."""

    def make_step(axis_name: AxisName, **options: Any) -> TrainStep:
        network = model.clone(axis_name=axis_name, whole_gradients=mesh.shape["space"] > 1)

        def apply_fn(variables: Any, images: jax.Array, **keywords: Any) -> Any:
            return network.apply(
                variables, normalize(images, preprocessing_of(config.data), model.param_dtype), **keywords
            )

        options |= {"reduction": config.loss.reduction, "accumulate": config.train.accumulate}
        step = make_train_step(apply_fn, optimizer, loss, axis_name=axis_name, pass_example_ids=True, **options)
        return kernels_for(mesh)(step)

    return make_parallel("mesh" if config.mesh else config.parallel, make_step, mesh)


def _fetched(given: str | None) -> str | None:
    if not given or not (weights.is_published(given) or is_remote(given) and not to_path(given, "--init").is_dir()):
        return given
    return str(writer_first(partial(weights.fetch, given)))


def run_length(config: Config, examples: int) -> Length:
    """Convert a run's epochs to steps, for a training split of this many examples.

    Raises:
        InputError: neither steps nor epochs are given, or too many.
    """
    train = config.train
    if train.steps is None and train.epochs is None:
        raise InputError("the length of the run is not given; set --train.epochs or --train.steps")
    epoch = examples / train.batch_size
    steps = train.steps if train.steps is not None else max(1, round((train.epochs or 0) * epoch))
    if steps >= 2**31:  # counters of steps are int32
        raise InputError(f"expected a run of less than 2**31 steps, got {steps}; set --train.steps or --train.epochs")
    keep = None if train.keep_every is None else max(1, round(train.keep_every * epoch))
    return Length(steps, max(1, round(train.eval_every * epoch)), keep, epoch)


def run_loss(config: Config, train: Split) -> Loss:
    """Make a run's loss; median-frequency class weights are computed from the training labels.

    Raises:
        InputError: the number of class weights differs from the number of classes.
    """
    given = config.loss.class_weights
    class_weights = None
    if given == "median":
        class_weights = median_frequency_weights(*class_frequencies(train)) ** config.loss.weight_power
    elif given != "none":
        if len(given) != train.num_classes:
            raise InputError(
                f"expected {train.num_classes} class weights for {train.dataset}, got {len(given)}; "
                "give one per class, or 'median'"
            )
        class_weights = np.asarray(given)
    return make_loss(loss_terms(config.loss), class_weights, config.loss.hard_fraction, config.loss.aux_weight)


# --- initial weights

# Parameters that a network of another stride or with other classes may lack; all others have to match.
_NEW = ("score_*", "upscore*", "classifier.*", "head.score.*", "aux.*")
# Options that affect the shapes or only training, or that go with the stride.
_FREE = frozenset(
    {"encoder", "encoder_norm", "width", "fc_features", "fc6_kernel", "head_features", "aux_head"}
    | {"dropout", "dropout_rate", "crop", "skip_bias", "upsample_bias"}
)
# 'At once' needs scales far below 1: the reference has 0.01 and 0.0001.
_AT_ONCE = 0.1


def starting_variables(config: Config, model: FCN, resuming: bool = False) -> tuple[dict[str, Any], Notes]:
    """Make a run's initial variables, and notes for the user on their source and possible problems.

    Args:
        config: the run's config, with ``init`` or ``init_from``; with neither, weights are random.
        model: the network.
        resuming: a checkpoint will replace the variables, so read no weights.

    Raises:
        InputError: the weights do not match the network or the run's preprocessing.
    """
    size = config.data.crop_size or config.data.input_size or (64, 64)
    variables = init_variables(model, jax.random.key(config.train.seed), size, config.data.channels or 3)
    if resuming:
        return variables, ()
    if config.init_from is not None:
        return _carry_over(config, model, variables, config.init_from)
    if config.init is not None:
        filled, report = weights.load_with_report(config.init, model, variables)
        _check_preprocessing(config, report.preprocessing, config.init)
        return filled, (_account(config.init, report), *_warnings(model, filled))
    if config.model.freeze_stages:
        return variables, ("frozen stages of the encoder have random weights: give --init or --init-from",)
    return variables, ()


def _carry_over(config: Config, model: FCN, variables: dict[str, Any], given: str) -> tuple[dict[str, Any], Notes]:
    """Load by name the parameters of another model of the family; score and upsampling layers may be new."""
    tensors, preprocessing, source = _open(given, model)
    if source is not None and type(source) is not type(model):
        names = [describe_model(network)[0] for network in (source, model)]
        raise InputError(
            f"--init-from {given}: {names[0]} is of another family than {names[1]}; choose one of the same family"
        )
    _check_preprocessing(config, preprocessing, given)
    try:
        filled, report = weights.load_with_report(tensors, model, variables, _NEW, ["*"])
    except InputError as error:
        what = str(error).removeprefix("the dict: ")
        if " tensor(s) " not in what and "the model has" not in what:
            raise InputError(f"--init-from {given}: {what}") from error
        what = what.partition("; ")[0]
        raise InputError(
            f"--init-from {given}: {what}; give both networks the same encoder, width and features"
        ) from error
    return filled, (_account(given, report), *_differences(source, model), *_warnings(model, filled))


def _open(given: str, model: FCN) -> tuple[weights.Source, str | None, FCN | None]:
    """Open a run or a file under our names: its tensors, its preprocessing, and its network, as far as known."""
    path = None if weights.is_published(given) else to_path(given, "--init-from")
    if path and path.is_dir() and (path / HUB_FILE).exists():
        given = str(path / HUB_FILE)
    elif path and path.is_dir():
        run = open_run(given)
        return weights.to_torch(run.model, run.variables), run.config.data.preprocessing, run.model
    elif path and not path.exists():
        raise InputError(
            f"--init-from {given}: no such run or file; train that run first, or give a file or a name that "
            "`fcn-jax models` lists"
        )
    tensors = weights.open_source(given)
    info = weights.inspect(tensors)
    if info.layout is None:
        raise weights.unknown_layout(tensors)
    if info.fit is None:
        return tensors, info.preprocessing, None
    # A published network's names depend on its stride, so first load it as the network that it is.
    name, classes = info.fit.models[0], info.fit.num_classes or model.num_classes
    source = create_model(name, classes, **info.fit.options)
    if type(source) is not type(model):
        return tensors, info.preprocessing, source
    same = {name: getattr(model, name) for name in ("width", "fc_features", "head_features") if hasattr(model, name)}
    source = create_model(name, classes, **{**same, **info.fit.options})
    shapes = jax.eval_shape(partial(init_variables, source), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return weights.to_torch(source, weights.load(tensors, source, zeros)), info.preprocessing, source


def _check_preprocessing(config: Config, expected: str | None, source: str) -> None:
    if expected == "caffe" and config.data.channels is not None:
        raise InputError(
            f"{source} expects caffe preprocessing, which --data.channels does not support; use imagenet weights"
        )
    if expected is not None and expected != config.data.preprocessing:
        raise InputError(
            f"{source} expects {expected} preprocessing, but the run has {config.data.preprocessing}; "
            f"set --data.preprocessing {expected}"
        )


def _account(given: str, report: weights.Report) -> str:
    new, unused = _layers(report.left, report.filled), _layers(report.ignored, report.filled.values())
    wide = [f"; {name}: {how}" for name, how in report.converted.items() if "widened" in how]
    return f"from {given}: {len(report.filled)} arrays; new: {new}; unused: {unused}{''.join(wide)}"


def _layers(names: Iterable[str], others: Collection[str]) -> str:
    """Join names by layer; if ``others`` has some arrays of a layer, list that layer by array."""
    parts = {name.rpartition(".")[0] for name in others}
    shown = (
        name if name.rpartition(".")[0] in parts else name.rpartition(".")[0]
        for name in names
        if not name.endswith(COUNTER)
    )
    return ", ".join(dict.fromkeys(shown)) or "nothing"


def _differences(source: FCN | None, model: FCN) -> Notes:
    """Warn of options with which the two networks compute differently from the same weights."""
    if source is None:
        return ()
    theirs, ours = describe_model(source)[1], describe_model(model)[1]
    differs = [f"{key} {theirs[key]} (here {ours[key]})" for key in ours.keys() - _FREE if theirs[key] != ours[key]]
    return (f"the weights come from a network with {', '.join(sorted(differs))}",) if differs else ()


def _warnings(model: FCN, variables: dict[str, Any]) -> Notes:
    """Warn if an 8s starts with untrained score layers on a trained encoder.

    The features of pool3 are far larger than the others and would dominate. At-once scales (the reference's
    voc-fcn8s-atonce), score layers trained in a 16s, or batch norm prevent that.
    """
    if not isinstance(model, ScoreFCN) or model.stride != 8 or model.encoder_norm is not None:
        return ()
    untrained = not np.any(variables["params"]["score_fr"]["kernel"])  # score layers are initialised at zero
    if not untrained or max(model.skip_scales) <= _AT_ONCE:
        return ()
    return (
        "an FCN-8s with new score layers learns little: train a 32s and a 16s first and give --init-from, or set "
        "--model.skip-scales 0.01 0.0001",
    )
