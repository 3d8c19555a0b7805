"""A trained network as one program with its weights inside, ONNX or StableHLO, that runs without this package."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcn_jax.errors import InputError
from fcn_jax.models.fcn import FCN, InterpolatedFCN, ScoreFCN, check_size
from fcn_jax.paths import replacing
from fcn_jax.preprocessing import Preprocessing, Standardize, normalize

MAX_DIFFERENCE = 1e-4
"""Between logits in float32, of the largest logit's magnitude where that is above 1."""
PLATFORMS = ("cpu", "cuda", "tpu")
"""For which a StableHLO file is lowered."""

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)  # hashable: jit keeps a program by it
class Program:
    """A network in eval mode and float32, with what goes in and what comes out."""

    model: FCN
    variables: Mapping[str, Any]
    preprocessing: Preprocessing
    preprocess: bool = False
    """Take images as they are read, uint8 or uint16, rather than normalised float32 images."""
    argmax: bool = False
    """Return classes, uint8 (b, h, w), rather than logits, float32 (b, h, w, num_classes)."""
    size: tuple[int, int] | None = None
    """Height and width of the images; None: any, which networks that interpolate do not offer."""
    class_names: tuple[str, ...] = ()
    """Go into an ONNX file's metadata, with the preprocessing that its input needs."""

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.preprocessing.mean) if isinstance(self.preprocessing, Standardize) else 3

    @property
    def dtype(self) -> np.dtype:
        """Of the images."""
        wide = isinstance(self.preprocessing, Standardize) and self.preprocessing.bits > 8
        return np.dtype((np.uint16 if wide else np.uint8) if self.preprocess else np.float32)

    def logits(self, images: jax.Array) -> jax.Array:
        """Return logits (b, h, w, num_classes) of images (b, h, w, channels)."""
        images = normalize(images, self.preprocessing) if self.preprocess else images
        return jnp.asarray(self.model.apply(self.variables, images, train=False))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return what the exported program returns."""
        logits = self.logits(images)
        return jnp.argmax(logits, -1).astype(jnp.uint8) if self.argmax else logits


def make_program(model: FCN, variables: Mapping[str, Any], preprocessing: Preprocessing, **options: Any) -> Program:
    """Return a program in float32 with plain JAX's kernels; ``options`` are the last four fields of ``Program``.

    Raises:
        InputError: a size that the network does not serve, or none for a network whose size has to be known.
    """
    size = options.get("size")
    if size is not None:
        check_size(model, size)
    elif isinstance(model, InterpolatedFCN) or (isinstance(model, ScoreFCN) and model.pool == "floor"):
        raise InputError("this network's program has one size of image; give --image-size HEIGHT WIDTH")
    # Without "highest", GPUs and TPUs multiply float32 in a narrower format.
    model = model.clone(dtype=jnp.float32, param_dtype=jnp.float32, precision="highest")
    return Program(model, jax.tree.map(lambda x: np.asarray(x, np.float32), variables), preprocessing, **options)


def to_stablehlo(program: Program) -> tuple[bytes, Run]:
    """Return a file that ``jax.export.deserialize`` reads, for ``PLATFORMS``, and what runs it."""
    h, w = program.size or ("h", "w")
    shape = jax.export.symbolic_shape(f"b, {h}, {w}, {program.channels}")
    exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, program.dtype))
    data = bytes(exported.serialize())
    call = jax.export.deserialize(bytearray(data)).call
    return data, lambda images: np.asarray(call(images))


def to_onnx(program: Program) -> tuple[bytes, Run]:
    """Return an ONNX file of any batch and one size of image, and what runs it, onnxruntime.

    Raises:
        InputError: without a size, or where jax2onnx or onnxruntime is not installed.
    """
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of values whose type the program does not need
    try:
        import jax2onnx
        import onnxruntime
    except ImportError as error:
        raise InputError(f"ONNX files need {error.name}: pip install 'fcn_jax[onnx]'") from error
    if program.size is None:
        raise InputError("an ONNX file has one size of image; give --image-size HEIGHT WIDTH")
    (batch,) = jax.export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((batch, *program.size, program.channels), program.dtype)
    names = {"input_names": ["images"], "output_names": ["classes" if program.argmax else "logits"]}
    model = jax2onnx.to_onnx(program, [image], model_name="fcn_jax", **names)
    needed = "none" if program.preprocess else str(program.preprocessing)
    for key, value in {"class_names": json.dumps(program.class_names), "preprocessing": needed}.items():
        model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: np.asarray(session.run(None, {"images": images})[0])


def largest_difference(program: Program, run: Run) -> float:
    """Return the largest difference between ``run`` and the network itself on random images, in batches of 1 and 2.

    It is that of the logits, divided by the largest magnitude where that is above 1. Of classes it is how far the logit
    of the class that was chosen lies below the largest one: two logits may be equal up to rounding.
    """
    rng, logits, worst = np.random.default_rng(0), jax.jit(program.logits), [0.0]
    for batch, (h, w) in ((1, program.size or (75, 101)), (2, program.size or (64, 96))):
        shape = (batch, h, w, program.channels)
        if program.preprocess:
            images = rng.integers(0, np.iinfo(program.dtype).max, shape, program.dtype, endpoint=True)
        else:
            images = rng.normal(size=shape).astype(np.float32)
        expected, found = np.asarray(logits(images)), run(images)
        if program.argmax:
            found = np.take_along_axis(expected, found[..., None].astype(int), -1)
            difference = np.abs(expected.max(-1, keepdims=True) - found)
        else:
            difference = np.abs(expected - found)
        worst.append(float(difference.max() / max(1.0, np.abs(expected).max())))
    return float(np.max(worst))  # NaN where any is


def write(file: Path, program: Program, form: str) -> float:
    """Write a file, "onnx" or "stablehlo", after running it; return the largest difference from the network.

    Raises:
        InputError: a difference above ``MAX_DIFFERENCE``, or a file that cannot be written; nothing is written then.
    """
    data, run = {"onnx": to_onnx, "stablehlo": to_stablehlo}[form](program)
    difference = largest_difference(program, run)
    if not difference <= MAX_DIFFERENCE:
        raise InputError(
            f"{file} is not written: the exported program differs from the network by {difference:.2g}, "
            f"and {MAX_DIFFERENCE:g} is allowed; try another version of jax{'2onnx' if form == 'onnx' else ''}"
        )
    try:
        with replacing(file) as part:
            part.write_bytes(data)
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}") from error
    return difference
