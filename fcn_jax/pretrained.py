"""Load a trained network from a published name, a file, a run or the Hugging Face hub, and predict with it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fcn_jax import weights
from fcn_jax.errors import InputError
from fcn_jax.evaluation.evaluate import PLAIN, Output, Predictor, Views, make_predictor
from fcn_jax.evaluation.predict import ImagePredictor, make_image_predictor
from fcn_jax.models import create_model, init_variables
from fcn_jax.models.catalog import describe_model
from fcn_jax.models.fcn import FCN
from fcn_jax.paths import to_path
from fcn_jax.preprocessing import Preprocessing, preprocessing_of


@dataclass(frozen=True)
class NetworkInfo:
    """What is needed to use a trained network besides its variables."""

    source: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    """RGB in [0, 255], one colour per class."""
    preprocessing: Preprocessing
    """A key of ``preprocessing.PREPROCESSINGS``, or the statistics of images that are not 8-bit RGB."""
    preprocessing_known: bool = True
    """Whether the source or the caller states it; otherwise imagenet is assumed."""
    input_size: tuple[int, int] | None = None
    """Height and width that images are resized to before the network; None: they keep their size."""
    step: int | None = None
    """Training step of a run's checkpoint; None for other sources."""
    named: bool = True
    """Whether the class names are the source's own; otherwise they are assumed."""
    licence: str | None = None
    score: str | None = None
    """The published mean IoU, with its split."""
    notes: tuple[str, ...] = ()
    """What was assumed because the source does not state it."""


def from_pretrained(
    source: str | Path, *, model: str | None = None, preprocessing: str | None = None, checkpoint: str = "best"
) -> tuple[FCN, dict[str, Any], NetworkInfo]:
    """Return a trained network, its variables, and what is needed to use them (classes, preprocessing, input size).

    Args:
        source: a name of ``weights.PRETRAINED``, a weights file in any of ``weights.LAYOUTS``, a run's folder, or
            ``hf://OWNER/REPO[@REVISION]``; files and folders are local or at ``gs://BUCKET/...``.
        model: a key of ``models.MODELS``, for a file that fits several networks.
        preprocessing: "imagenet" or "caffe", for a file that does not state it, in place of its layout's.
        checkpoint: of a run: "best", "last", or a step number.

    Raises:
        InputError: the source cannot be opened, holds only an encoder, or does not state which network it is.
    """
    name, entry = str(source), weights.PRETRAINED.get(str(source))
    folder = None if weights.is_published(name) else to_path(source, "source")
    if folder and folder.is_dir():
        if not is_hub_folder(folder):
            if model or preprocessing:
                given = model or preprocessing
                raise InputError(f"{name}: a run records its network and preprocessing; leave out {given}")
            return _from_run(name, checkpoint)
        source = folder / "model.safetensors"
    if entry is not None and entry.is_encoder:
        raise InputError(f"{name} is an encoder, not a whole network; start a run from it: train.py --init {name}")
    tensors = weights.open_source(source)
    info = weights.inspect(tensors, preprocessing)
    if info.layout is None:
        raise weights.unknown_layout(tensors)
    if info.fit is None and (info.layout != "fcn_jax" or model is None):
        alone = "holds only an encoder; start a run from it: train.py --init"
        raise InputError(f"{name} {'does not state its network; give --model' if info.layout == 'fcn_jax' else alone}")
    if info.fit is not None and model not in (None, *info.fit.models):
        raise InputError(f"{name} belongs to {' or '.join(info.fit.models)}, not {model}; leave out --model {model}")
    network = model or (entry.network if entry else weights.only_model(name, info))
    options, num_classes = weights.source_options(info, network)
    if num_classes is None:
        raise InputError(f"{name}: its score layer is missing; give the file of a whole network")
    try:
        made = create_model(network, num_classes, **options)
    except InputError as error:
        raise InputError(f"{name}: its shapes match no network: {error}") from error
    like = jax.eval_shape(functools.partial(init_variables, made), jax.random.key(0))
    variables = weights.load(tensors, made, like)
    classes, notes = _classes(name, info, num_classes, named=entry is not None)
    if info.fit is None:  # a .pth file in our names
        notes = (*notes, f"{name} does not state skip scales, pooling and crops: the defaults of {network} are assumed")
    chosen = info.preprocessing
    if chosen is None:
        notes = (*notes, f"{name} does not state its preprocessing: imagenet is assumed")
    about = NetworkInfo(
        source=name,
        preprocessing=chosen or "imagenet",
        preprocessing_known=chosen is not None,
        licence=entry.licence if entry else None,
        score=entry.score if entry else None,
        notes=notes,
        **classes,
    )
    return made, variables, about


def predict(
    model: FCN,
    variables: Mapping[str, Any],
    image: np.ndarray,
    info: NetworkInfo,
    probabilities: bool = False,
    confidence: bool = False,
    views: Views = PLAIN,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Predict one image of any size; large ones are cut into tiles.

    Args:
        model: from ``from_pretrained``, like the variables and ``info``.
        variables: its variables.
        image: RGB, uint8 (h, w, 3); for a network trained on other channels, uint8 or uint16 (h, w, channels).
        info: its preprocessing and input size.
        probabilities: return the softmax instead of the classes.
        confidence: return each pixel's class together with its softmax.
        views: ``Views(scales, flip)`` over which the softmax is averaged.
        mesh: from ``devices.pick_mesh``, as in "space=4", to split each image over devices by rows.

    Returns:
        Classes uint8 (h, w); with ``probabilities`` float32 (h, w, num_classes); with ``confidence`` float32 (h, w, 2).

    Raises:
        InputError: an image of another dtype or shape, or of a size that the network does not support.
    """
    is_rgb = isinstance(info.preprocessing, str)
    channels, bits = (
        (3, 8) if isinstance(info.preprocessing, str) else (len(info.preprocessing.mean), info.preprocessing.bits)
    )
    if probabilities and confidence:
        raise InputError("probabilities include the confidence; set only one of them")
    if (
        getattr(image, "dtype", None) != f"uint{bits}"
        or image.ndim != 3
        or image.shape[2] != channels
        or not image.size
    ):
        found = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
        expected = "an RGB image, uint8 (h, w, 3)" if is_rgb else f"an image, uint{bits} (h, w, {channels})"
        raise InputError(f"expected {expected}, got {found}")
    output: Output = "probabilities" if probabilities else "confidence" if confidence else "classes"
    if info.input_size is None:
        return _any_size(model, info.preprocessing, output, views, mesh)(variables, image)
    from fcn_jax.data.transforms import resize_image  # OpenCV

    resized = resize_image(image, info.input_size)[None]
    return _one_size(model, info.preprocessing, output, views, mesh)(variables, resized, image.shape[:2])[0]


# Cached, so that a program is compiled once for many images.
@functools.lru_cache(maxsize=8)
def _any_size(
    model: FCN, preprocessing: Preprocessing, output: Output, views: Views, mesh: Mesh | None
) -> ImagePredictor:
    return make_image_predictor(model, preprocessing, output=output, views=views, mesh=mesh)


@functools.lru_cache(maxsize=8)
def _one_size(model: FCN, preprocessing: Preprocessing, output: Output, views: Views, mesh: Mesh | None) -> Predictor:
    return make_predictor(model, preprocessing, mesh, views, output)


def _from_run(source: str, checkpoint: str) -> tuple[FCN, dict[str, Any], NetworkInfo]:
    from fcn_jax.training.run import open_run

    run = open_run(source, checkpoint)
    data, dataset = run.config.data, run.dataset
    about = {"preprocessing": preprocessing_of(data), "input_size": data.input_size, "step": run.step}
    info = NetworkInfo(source, dataset.class_names, dataset.palette, **about)  # type: ignore[arg-type]
    return run.model, run.variables, info


def _classes(name: str, info: weights.Info, count: int, named: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    from fcn_jax.data import io, voc  # OpenCV

    if info.classes is not None:
        return {**info.classes}, ()
    palette = io.palette(count)
    if count == len(voc.CLASSES):
        note = f"{name} has no class names: PASCAL VOC's are assumed"
        return {"class_names": voc.CLASSES, "palette": palette, "named": named}, (note,) * (not named)
    numbers = tuple(f"class {index}" for index in range(count))
    return {"class_names": numbers, "palette": palette, "named": False}, (
        f"{name} has no class names: classes are numbered",
    )


def is_hub_folder(folder: Path) -> bool:
    """Whether ``write_hub_files`` wrote the folder's config.json, and not a run."""
    try:
        return json.loads((folder / "config.json").read_text()).get("library_name") == "fcn_jax"
    except (OSError, ValueError, AttributeError):
        return False


def check_hub_folder(folder: Path) -> None:
    """Raise InputError if ``write_hub_files`` would overwrite another program's config.json, or any README.md."""
    if (folder / "config.json").exists() and not is_hub_folder(folder):
        raise InputError(f"{folder} has a config.json of something else; give another folder as --out")
    if (folder / "README.md").exists():
        raise InputError(f"{folder} has a README.md, which would be overwritten; move it, or give another --out")


def write_hub_files(folder: Path, model: FCN, info: NetworkInfo, scores: Mapping[str, Any]) -> None:
    """Write config.json and the model card, README.md, beside a model.safetensors."""
    name, options = describe_model(model)
    config = {"library_name": "fcn_jax", "model": name, "num_classes": model.num_classes, "options": options}
    config |= {"preprocessing": info.preprocessing, "input_size": info.input_size}
    config |= {"class_names": info.class_names, "palette": info.palette}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shown = {key: f"{value:.2%}" if isinstance(value, float) else value for key, value in scores.items()}
    rows = "".join(f"| {key.replace('_', ' ')} | {value} |\n" for key, value in shown.items())
    resized = f"; images are resized to {info.input_size[0]}x{info.input_size[1]} first" if info.input_size else ""
    card = _CARD.format(
        name=name,
        encoder=model.encoder,
        classes=", ".join(info.class_names),
        preprocessing=_PREPROCESSING[str(info.preprocessing)] + resized,
        scores=f"| score | |\n|---|---|\n{rows}" if rows else "No score is recorded: evaluate before exporting.\n",
        licence=info.licence or "not stated; add the one that you publish these weights under",
    )
    (folder / "README.md").write_text(card)


_PREPROCESSING = {
    "imagenet": "RGB in 0 ... 1, minus (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)",
    "caffe": "BGR in 0 ... 255, minus (104.00699, 116.66877, 122.67892)",
}
_CARD = """---
library_name: fcn_jax
pipeline_tag: image-segmentation
tags: [fcn, semantic-segmentation, jax, flax]
---

# {name}

A fully convolutional network for semantic segmentation (Long, Shelhamer & Darrell 2015) with encoder {encoder}.

Classes: {classes}

Preprocessing: {preprocessing}

{scores}
Licence: {licence}

In JAX, with fcn_jax:

```python
import fcn_jax
model, variables, info = fcn_jax.from_pretrained("hf://OWNER/REPO")
classes = fcn_jax.predict(model, variables, image, info)   # image: RGB, uint8 (h, w, 3)
```

In PyTorch, with the twin that fcn_jax has of each network:

```python
import fcn_jax
from fcn_jax.compare import make_twin
from safetensors.torch import load_file
model, variables, info = fcn_jax.from_pretrained("model.safetensors")
twin = make_twin(model).eval()
twin.load_state_dict(load_file("model.safetensors"))
```
"""
