"""The comparisons of `fcn-jax parity`: a network against its PyTorch twin, and against itself computed otherwise."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax import weights
from fcn_jax.compare import make_twin
from fcn_jax.compare.compare import Report, compare
from fcn_jax.compare.jax_side import dilated_upsampling, make_jax_side, without_dropout
from fcn_jax.compare.sides import Side
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError
from fcn_jax.losses import IGNORE
from fcn_jax.models.catalog import init_variables
from fcn_jax.models.fcn import FCN, ResizeFCN

__all__ = ["THRESHOLDS", "Case", "against_jax", "against_torch", "cancelled_biases", "random_batch", "random_variables"]

THRESHOLDS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-2}
"""The error over which a layer is named: a few thousand roundings of each dtype."""
_DTYPES: dict[str, tuple[Any, Any]] = {
    "float64": (jnp.float64, jnp.float64),
    "float32": (jnp.float32, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.float32),
}


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
    """Of SGD."""
    optim: OptimConfig | None = None
    """Of both sides."""
    threshold: float | None = None
    """By default that of the dtype."""

    def limit(self, dtype: str) -> float:
        """Return the error over which a layer is named in a comparison in ``dtype``."""
        return THRESHOLDS[dtype] if self.threshold is None else self.threshold


def _in_dtype(model: FCN, variables: Any, dtype: str) -> tuple[FCN, Any]:
    compute, param = _DTYPES[dtype]
    return model.clone(dtype=compute, param_dtype=param), jax.tree.map(lambda x: jnp.asarray(x, param), variables)


def random_variables(model: FCN, seed: int = 0) -> dict[str, Any]:
    """Draw every array of a network, so that nothing compared is zero and no two layers are alike.

    Kernels are He normal (over the taps that an output pixel of a transposed convolution meets), biases and running
    means N(0, 0.1^2), scales N(1, 0.2^2), running variances uniform in [0.5, 1.5). All are NumPy float32, which every
    dtype but bfloat16 holds exactly.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(init_variables, model, image_size=(320, 320)), jax.random.key(0))

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

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(
    size: tuple[int, int], num_classes: int, batch_size: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw images N(0, 1) (b, h, w, 3) float32 and labels (b, h, w), a tenth of them ignored (255)."""
    rng = np.random.default_rng([seed, 1])
    images = rng.standard_normal((batch_size, *size, 3), np.float32)
    labels = rng.integers(0, num_classes, (batch_size, *size))
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    return images, labels


def cancelled_biases(model: FCN) -> list[str]:
    """Return the biases whose true gradient is zero, because the batch norm after them takes the mean off."""
    if model.encoder_norm is None or model.freeze_encoder:
        return []
    shapes = jax.eval_shape(functools.partial(init_variables, model, image_size=(320, 320)), jax.random.key(0))
    return [f"vgg.{name}.bias" for name in shapes["params"]["vgg"] if name.startswith("conv")]


def against_torch(case: Case, devices: int = 1) -> Report:
    """Compare a network with its PyTorch twin. Below float64 both are also compared with the twin in float64.

    Args:
        case: what to compare; torch computes in bfloat16 by autocast.
        devices: over how many the JAX side spreads the batch (pmap); torch has the whole of it.

    Raises:
        InputError: torch is not installed, or a side cannot serve the input.
    """
    dtype, optim = case.dtype, case.optim
    model, variables = _in_dtype(without_dropout(case.model), case.variables, dtype)
    twin = make_twin(model)
    import torch

    from fcn_jax.compare.torch_side import make_torch_side

    twin.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in weights.to_torch(model, variables).items()}
    )
    name = f"jax, {devices} devices" if devices > 1 else "jax"
    mode = "pmap" if devices > 1 else "jit"
    reference = noise = None
    if dtype != "float64":
        reference = make_torch_side(twin, optim, name="torch float64", dtype="float64")
        noise = make_torch_side(twin, optim, name="torch channels_last", dtype=dtype, channels_last=True)
    return compare(
        make_jax_side(model, variables, optim, name=name, mode=mode, devices=devices),
        make_torch_side(twin, optim, dtype=dtype),
        case.images,
        case.labels,
        steps=case.steps,
        threshold=case.limit(dtype),
        reference=reference,
        noise=noise,
        cancelled=cancelled_biases(model),
    )


def against_jax(case: Case, devices: int = 2) -> Iterator[Report]:
    """Compare a network with itself, computed in other ways.

    The ways: pmap and mesh on ``devices`` against plain jit on one; float32 against float64; the precisions
    "default" and "high" against "highest"; polyphase upsampling against the dilated convolution; rematerialised
    stages against kept ones.

    Args:
        case: what to compare.
        devices: over how many pmap and mesh spread the batch.

    Yields:
        One report for each pair.

    Raises:
        InputError: the batch does not split over the devices, or float64 is turned off in JAX.
    """
    if len(case.images) % devices:
        raise InputError(f"expected a batch that splits over {devices} devices, got {len(case.images)} images")
    model = without_dropout(case.model)

    def side(name: str, network: FCN = model, dtype: str = case.dtype, **options: Any) -> Side:
        return make_jax_side(*_in_dtype(network, case.variables, dtype), case.optim, name=name, **options)

    def pair(ours: Side, theirs: Side, dtype: str = case.dtype) -> Report:
        return compare(
            ours,
            theirs,
            case.images,
            case.labels,
            steps=case.steps,
            modes=("train",),
            threshold=case.limit(dtype),
            cancelled=cancelled_biases(model),
        )

    # Shared by many pairs, so that it is compiled once.
    plain = side("one device")

    def renamed(name: str) -> Side:
        return dataclasses.replace(plain, name=name)

    def at(precision: str) -> Side:
        given = precision == model.precision
        return renamed(precision) if given else side(precision, model.clone(precision=precision))

    for mode in ("pmap", "mesh"):
        yield pair(side(f"{mode} x {devices}", mode=mode, devices=devices), plain)
    single, double = (renamed(d) if d == case.dtype else side(d, dtype=d) for d in ("float32", "float64"))
    yield pair(single, double, "float32")
    highest = at("highest")
    for precision in ("default", "high"):
        yield pair(at(precision), highest)
    if not isinstance(model, ResizeFCN):
        yield pair(renamed("polyphase"), side("dilated", interceptor=dilated_upsampling))
    other = side("kept" if model.remat else "remat", model.clone(remat=not model.remat))
    yield pair(other, renamed("remat" if model.remat else "kept"))
