"""`fcn-jax predict`: write label maps, overlays and class shares for images."""

from __future__ import annotations

import csv
import glob
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from fcn_jax.cli.network import NetworkArguments, open_network
from fcn_jax.cli.process import OutputPath, make_folder
from fcn_jax.data.io import IMAGE_SUFFIXES, decode_channels, decode_image
from fcn_jax.devices import groups, pick_mesh
from fcn_jax.errors import InputError, UnreadableError
from fcn_jax.evaluation.evaluate import Views
from fcn_jax.evaluation.figures import overlay, save_palette_png
from fcn_jax.pretrained import NetworkInfo, predict

_SHOWN = 8
"""Up to this many images get a line each; for more only the summary is printed."""


@dataclass(frozen=True)
class PredictArguments:
    """Write a label map (NAME.png) and an overlay for each image, and the share of each class (classes.csv).

    Images that cannot be read or predicted are named and skipped, and the exit code is 3.
    """

    images: tyro.conf.Positional[tuple[str, ...]]
    """Image files of any size, folders of them, or patterns in quotes, as in 'frames/*.jpg'."""
    out: OutputPath
    """Folder to write to. What an earlier command wrote there is overwritten; classes.csv has the last one's images."""
    probabilities: bool = False
    """Also write NAME.npz: the softmax as `probabilities`, float16 (height, width, classes)."""
    confidence: bool = False
    """Also write NAME_confidence.png: the softmax of the predicted class, 0 ... 255 for 0 ... 1."""
    flip: bool = False
    """Average the softmax over the image and its mirror image."""
    scales: tuple[float, ...] = (1.0,)
    """Average the softmax over the image at these scales, as in 0.75 1 1.25."""
    mesh: str | None = None
    """space=N splits each image over N devices by rows, so that images up to N times as large need no tiles."""
    network: Annotated[NetworkArguments, tyro.conf.arg(name="")] = field(default_factory=NetworkArguments)


def main(arguments: Sequence[str]) -> int:
    """Predict images with a trained network; the exit code."""
    given = tyro.cli(PredictArguments, prog="fcn-jax predict", args=list(arguments))
    if not given.images:
        raise InputError("no image given; name image files or a folder of images")
    views = Views(given.scales, given.flip)
    mesh = None if given.mesh is None else pick_mesh(given.mesh)
    if mesh is not None and groups(mesh) > 1:
        raise InputError(f"--mesh {given.mesh} splits more than rows; give space={mesh.size} alone")
    model, variables, info = open_network(given.network)
    suffixes = IMAGE_SUFFIXES if isinstance(info.preprocessing, str) else (*IMAGE_SUFFIXES, ".npy")
    images = [path for name in given.images for path in _files(name, suffixes)]
    table_file = given.out / "classes.csv"
    _check_outputs(images, [output for image in images for output in _outputs(given, image)], table_file.exists())
    make_folder(given.out)
    options: dict[str, Any] = {
        "probabilities": given.probabilities,
        "confidence": given.confidence,
        "views": views,
        "mesh": mesh,
    }
    options["confidence"] &= not given.probabilities
    seconds: Counter[str] = Counter()
    skipped = 0
    began = time.perf_counter()
    writing: Future[list[Any]] | None = None
    # Write the files of an image while the next one is predicted.
    with ExitStack() as files, ThreadPoolExecutor(1) as writer:
        table: Any = None
        bar = Console(stderr=True)
        for path in track(images, "predict", console=bar, transient=True, disable=not bar.is_terminal):
            try:
                with _timed(seconds, "decoding"):
                    image = _decode(_read(path), str(path), info)
                with _timed(seconds, "network"):
                    found = predict(model, variables, image, info, **options)
            except InputError as error:
                message = str(error) if str(path) in str(error) else f"{path}: {error}"
                skipped += 1
                if skipped == len(images):
                    raise InputError(message) from error
                print(f"skipped: {message.partition('; ')[0]}", file=sys.stderr)
                continue
            if writing is not None:
                table.writerow(writing.result())
            if table is None:  # an earlier table is lost only once there is a new one
                table = csv.writer(files.enter_context(table_file.open("w", newline="")))
                table.writerow(["image", "height", "width", *info.class_names])
            writing = writer.submit(_write, given, path, image, found, info, seconds)
            if len(images) <= _SHOWN:
                print(f"{path}: {image.shape[0]}x{image.shape[1]} -> {_outputs(given, path)[0]}")
        if writing is not None:
            table.writerow(writing.result())
    elapsed, done = time.perf_counter() - began, len(images) - skipped
    parts = ", ".join(f"{name} {value / elapsed:.0%}" for name, value in seconds.items())
    print(f"{done} image{'s' * (done != 1)} in {elapsed:.1f} s: {parts}; class shares in {table_file}")
    if skipped:
        print(f"error: {skipped} of {len(images)} images were skipped", file=sys.stderr)
    return 3 if skipped else 0


@contextmanager
def _timed(seconds: Counter[str], name: str) -> Iterator[None]:
    before = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - before  # type: ignore[assignment]


def _files(name: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the images that an argument names, in the order of their names."""
    path = Path(name)
    if path.is_dir():
        found = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in suffixes and not file.name.startswith(".") and file.is_file()
        )
        if not found:
            raise InputError(f"{path}: holds no image ({' '.join(suffixes)}); name another folder")
        return found
    if path.exists() or not glob.has_magic(name):
        return [path]
    if not (matching := sorted(glob.glob(name, recursive=True))):
        raise InputError(f"{name}: no file matches; correct the pattern")
    return [Path(file) for file in matching]


def _outputs(given: PredictArguments, image: Path) -> list[Path]:
    """Return the output files of an image: label map, overlay and optional ones."""
    endings = [".png", "_overlay.png"]
    endings += [".npz"] * given.probabilities + ["_confidence.png"] * given.confidence
    return [given.out / f"{image.stem}{ending}" for ending in endings]


def _write(
    given: PredictArguments,
    path: Path,
    image: np.ndarray,
    found: np.ndarray,
    info: NetworkInfo,
    seconds: Counter[str],
) -> list[Any]:
    """Write the files of an image; return its row of classes.csv."""
    began = time.perf_counter()
    label_file, overlay_file, *others = _outputs(given, path)
    if given.probabilities:
        np.savez_compressed(others[0], probabilities=found.astype(np.float16), class_names=info.class_names)
        labels, confidence = found.argmax(-1).astype(np.uint8), found.max(-1)
    elif given.confidence:
        labels, confidence = found[..., 0].astype(np.uint8), found[..., 1]
    else:
        labels, confidence = found, None
    save_palette_png(label_file, labels, info.palette)
    blended = overlay(image, labels, info.palette, info.class_names, path.name)
    pictures = {overlay_file: cv2.cvtColor(blended, cv2.COLOR_RGB2BGR)}
    if given.confidence and confidence is not None:
        pictures[others[-1]] = np.rint(255 * confidence).astype(np.uint8)
    for file, pixels in pictures.items():
        if not cv2.imwrite(str(file), pixels):
            raise InputError(f"{file} could not be written; check the disk")
    shares = np.bincount(labels.ravel(), minlength=len(info.class_names)) / labels.size
    seconds["encoding"] += time.perf_counter() - began  # type: ignore[assignment]
    return [path, *labels.shape, *(f"{share:.6f}" for share in shares)]


def _check_outputs(images: Sequence[Path], outputs: Sequence[Path], again: bool) -> None:
    """Raise InputError where an output would overwrite another one, an input, or, unless ``again``, any file."""
    if len(set(outputs)) < len(outputs):
        twice, _ = Counter(outputs).most_common(1)[0]
        raise InputError(f"{twice} would be written for two of the images; rename one of them")
    if odd := [image for image in map(str, images) if image.encode(errors="replace").decode() != image]:
        raise InputError(f"{odd[0]!a}: the name is not valid UTF-8; rename the file")
    inputs = {image.resolve() for image in images}
    for path in outputs:
        if path.resolve() in inputs:
            raise InputError(f"{path} is one of the images and would be overwritten; choose another --out")
        if not again and path.exists():
            raise InputError(f"{path} exists, in a folder without an earlier classes.csv; choose another --out")


def _decode(data: bytes, name: str, info: NetworkInfo) -> np.ndarray:
    if isinstance(info.preprocessing, str):
        return decode_image(data, name)
    image = decode_channels(data, name, len(info.preprocessing.mean))
    if image.dtype != f"uint{info.preprocessing.bits}":
        raise UnreadableError(
            f"{name}: is {image.dtype}, but the network takes uint{info.preprocessing.bits}; convert the image"
        )
    return image


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}; name an image file") from error
