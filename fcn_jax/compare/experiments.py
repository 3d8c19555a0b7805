"""The comparisons of `fcn-jax parity`: a network against its PyTorch twin, and against itself computed differently."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.compare import import_torch_adapter
from fcn_jax.compare.jax_adapter import dilated_upsampling, make_jax_side
from fcn_jax.compare.parity import Gradient, Report, Side, TrainedStep, compare
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError, first_line
from fcn_jax.losses import IGNORE
from fcn_jax.models.catalog import init_variables
from fcn_jax.models.fcn import FCN, DilatedFCN, InterpolatedFCN, encoder_stage
from fcn_jax.weights.save import write_arrays

THRESHOLDS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-2}
"""The error above which a layer is named, by dtype."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its weights and a batch, and how they are compared."""

    model: FCN
    """A network of the catalogue; ``dtype`` and ``param_dtype`` are replaced."""
    variables: Any
    images: np.ndarray
    """Normalised (b, h, w, 3)."""
    labels: np.ndarray
    """(b, h, w), 255 is ignored."""
    dtype: str = "float32"
    """A key of ``THRESHOLDS``."""
    steps: int = 20
    """Steps of SGD."""
    optim: OptimConfig | None = None
    """The optimiser settings of both sides."""
    threshold: float | None = None
    """By default the dtype's, from ``THRESHOLDS``."""

    def jax_side(self, name: str, model: FCN, dtype: str | None = None, **options: Any) -> Side:
        """Make the side of a variant of the network; see ``make_jax_side``. With bfloat16, parameters are float32."""
        dtype = dtype or self.dtype
        variables = jax.tree.map(lambda x: jnp.asarray(x, _param_dtype(dtype)), self.variables)
        model = model.clone(dtype=jnp.dtype(dtype).type, param_dtype=_param_dtype(dtype))
        return make_jax_side(model, variables, self.optim, name=name, **options)

    def compare(self, ours: Side, theirs: Side, dtype: str | None = None, **options: Any) -> Report:
        """Compare two sides on the batch."""
        threshold = THRESHOLDS[dtype or self.dtype] if self.threshold is None else self.threshold
        options |= {"steps": self.steps, "threshold": threshold, "cancelled": cancelled_biases(self.model)}
        return compare(ours, theirs, self.images, self.labels, **options)


def _param_dtype(dtype: str) -> Any:
    return jnp.float64 if dtype == "float64" else jnp.float32


def _shapes(model: FCN) -> Any:
    return jax.eval_shape(functools.partial(init_variables, model, image_size=(320, 320)), jax.random.key(0))


def random_variables(model: FCN, seed: int = 0) -> dict[str, Any]:
    """Draw all arrays of a network at random, so that no compared value is zero and no two layers are equal.

    Kernels are He normal (for transposed convolutions, with the fan-in of an output pixel), biases and running
    means N(0, 0.1^2), scales N(1, 0.2^2), running variances uniform in [0.5, 1.5). All are NumPy float32, which every
    dtype but bfloat16 holds exactly.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        layer, name = path[-2].key, path[-1].key
        if name == "kernel":
            fan_in = math.prod(leaf.shape[:3]) / (4 if layer.startswith(("upscore", "deconv")) else 1)
            return rng.standard_normal(leaf.shape, np.float32) * np.float32(math.sqrt(2 / fan_in))
        if name == "scale":
            return (1 + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        if name == "var":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, _shapes(model))


def random_batch(size: tuple[int, int], num_classes: int, batch_size: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """Draw images N(0, 1) (b, h, w, 3) float32 and labels (b, h, w), a tenth of them ignored (255)."""
    rng = np.random.default_rng([seed, 1])
    images = rng.standard_normal((batch_size, *size, 3), np.float32)
    labels = rng.integers(0, num_classes, (batch_size, *size))
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    return images, labels


def cancelled_biases(model: FCN) -> list[str]:
    """Return the biases whose true gradient is zero, because the batch norm after them subtracts the mean."""
    if model.encoder_norm is None or isinstance(model, DilatedFCN):  # ResNet convolutions have no bias
        return []
    convs = [name for name in _shapes(model)["params"]["vgg"] if name.startswith("conv")]
    return [f"vgg.{name}.bias" for name in convs if encoder_stage(("vgg", name)) > model.freeze_stages]


def against_torch(case: Case, devices: int = 1) -> Report:
    """Compare a network with its PyTorch twin; below float64, also compare both with the twin in float64.

    Our side splits the batch over ``devices`` (pmap). Raises an InputError if torch is missing or the input invalid.
    """
    torch = import_torch_adapter()
    twin = torch.load_twin(case.model.clone(param_dtype=_param_dtype(case.dtype)), case.variables)
    side, more = functools.partial(torch.make_torch_side, twin, case.optim), {}
    if case.dtype != "float64":
        more["reference"] = side(name="torch float64", dtype="float64")
        more["noise"] = side(name="torch channels_last", dtype=case.dtype, channels_last=True)
    several: dict[str, Any] = {"mode": "pmap", "devices": devices} if devices > 1 else {}
    ours = case.jax_side(f"jax, {devices} devices" if several else "jax", case.model, **several)
    try:
        return case.compare(ours, side(dtype=case.dtype), **more)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError("torch's batch norm needs several values per channel; give a larger image or more") from error


def against_jax(case: Case, devices: int = 2) -> Iterator[Report]:
    """Compare a network with itself, computed differently; yield one report for each pair.

    The pairs: pmap and mesh on ``devices`` against one device; float32 against float64; the precisions "default" and
    "high" against "highest"; polyphase upsampling against the dilated convolution; rematerialised against stored
    stages. Raises an InputError if the batch does not split over the devices, or float64 is turned off in JAX.
    """
    if len(case.images) % devices:
        raise InputError(f"expected a batch that splits over {devices} devices, got {len(case.images)} images")
    model, pair = case.model, functools.partial(case.compare, modes=("train",))
    # Shared by many pairs, so that it is compiled once.
    plain = case.jax_side("one device", model)

    def renamed(name: str) -> Side:
        return dataclasses.replace(plain, name=name)

    def at(precision: str) -> Side:
        given = precision == model.precision
        return renamed(precision) if given else case.jax_side(precision, model.clone(precision=precision))

    for mode in ("pmap", "mesh"):
        yield pair(case.jax_side(f"{mode} x {devices}", model, mode=mode, devices=devices), plain)
    single, double = (renamed(d) if d == case.dtype else case.jax_side(d, model, d) for d in ("float32", "float64"))
    yield pair(single, double, "float32")
    highest = at("highest")
    for precision in ("default", "high"):
        yield pair(at(precision), highest)
    if not isinstance(model, InterpolatedFCN):
        yield pair(renamed("polyphase"), case.jax_side("dilated", model, interceptor=dilated_upsampling))
    names = ("stored", "remat") if model.remat else ("remat", "stored")
    yield pair(case.jax_side(names[0], model.clone(remat=not model.remat)), renamed(names[1]))


def save_record(case: Case, path: Path, about: Mapping[str, Any]) -> None:
    """Write our side's results to a .safetensors file: layers, loss, gradient, statistics, every training step.

    ``about`` describes the computation; ``against_record`` rejects a file with another description.
    """
    side = case.jax_side(str(about["name"]), case.model)
    arrays = {
        f"layers/{mode}/{name}": value
        for mode in ("eval", "train")
        for name, value in side.layers(case.images, mode == "train").items()
    }
    if side.gradient and side.train:
        gradient = side.gradient(case.images, case.labels)
        arrays["loss"] = np.asarray(gradient.loss)
        arrays |= {f"gradients/{name}": value for name, value in gradient.gradients.items()}
        arrays |= {f"statistics/{name}": value for name, value in gradient.statistics.items()}
        for number, step in enumerate(side.train(case.images, case.labels, case.steps)):
            arrays[f"steps/{number}/loss"] = np.asarray(step.loss)
            arrays |= {f"steps/{number}/parameters/{name}": np.array(x) for name, x in step.parameters.items()}
    metadata = {"about": json.dumps(about), "order": json.dumps(list(arrays))}
    write_arrays(path, {name: np.asarray(x, order="C") for name, x in arrays.items()}, metadata)


def against_record(case: Case, path: Path, about: Mapping[str, Any]) -> Report:
    """Compare our side with a file of ``save_record``; InputError if it is not one, or describes other work."""
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata, arrays = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        theirs, order = json.loads(metadata["about"]), json.loads(metadata["order"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        message = f"--against {path}: not a file written by fcn-jax parity --save ({first_line(error)})"
        raise InputError(f"{message}; give such a file, torch or jax") from error
    mine = json.loads(json.dumps(about))
    if differs := [key for key in mine if key != "name" and theirs.get(key) != mine[key]]:
        pairs = ", ".join(f"{key} {theirs.get(key)} (here {mine[key]})" for key in differs)
        raise InputError(f"--against {path} was saved with {pairs}; give the same options")

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): arrays[name] for name in order if name.startswith(prefix)}

    def train(images: np.ndarray, labels: np.ndarray, steps: int) -> Iterator[TrainedStep]:
        for number in itertools.islice(itertools.count(), steps):
            yield TrainedStep(float(arrays[f"steps/{number}/loss"]), under(f"steps/{number}/parameters/"))

    gradient = Gradient(arrays["loss"], under("gradients/"), under("statistics/"))
    layers = {train: under(f"layers/{mode}/") for mode, train in (("eval", False), ("train", True))}
    side = Side(theirs["name"], lambda images, train: layers[train], lambda images, labels: gradient, train)
    return case.compare(case.jax_side(str(about["name"]), case.model), side)
