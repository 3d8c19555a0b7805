"""`fcn-jax predict`: label maps and overlays of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import cv2
import tyro

from fcn_jax.cli.network import NetworkArguments, open_network
from fcn_jax.cli.process import make_folder
from fcn_jax.data.io import decode_image
from fcn_jax.devices import groups, pick_mesh
from fcn_jax.errors import InputError
from fcn_jax.evaluation.figures import overlay, save_palette_png
from fcn_jax.pretrained import predict


@dataclass(frozen=True)
class PredictArguments:
    """Write a label map and an overlay for each image."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files of any size."""
    out: Path
    """Folder to write to."""
    mesh: str | None = None
    """space=N splits each image over N devices by rows, so that images N times as large are not cut into tiles."""
    network: Annotated[NetworkArguments, tyro.conf.arg(name="")] = field(default_factory=NetworkArguments)


def main(arguments: Sequence[str]) -> int:
    """Predict images with a trained network; the exit code."""
    given = tyro.cli(PredictArguments, prog="fcn-jax predict", args=list(arguments))
    if not given.images:
        raise InputError("no image given; name one or more image files")
    outputs = [(given.out / f"{image.stem}.png", given.out / f"{image.stem}_overlay.png") for image in given.images]
    mesh = None if given.mesh is None else pick_mesh(given.mesh)
    if mesh is not None and groups(mesh) > 1:
        raise InputError(f"--mesh {given.mesh} splits more than rows; give space={mesh.size} alone")
    _check_outputs(given.images, [path for pair in outputs for path in pair])
    make_folder(given.out)
    model, variables, info = open_network(given.network)
    for path, (out, overlay_out) in zip(given.images, outputs, strict=True):
        image = decode_image(_read(path), str(path))
        labels = predict(model, variables, image, info, mesh=mesh)
        save_palette_png(out, labels, info.palette)
        blended = overlay(image, labels, info.palette, info.class_names, path.name)
        if not cv2.imwrite(str(overlay_out), cv2.cvtColor(blended, cv2.COLOR_RGB2BGR)):
            raise InputError(f"{overlay_out} could not be written; check the disk")
        print(f"{path}: {image.shape[0]}x{image.shape[1]} -> {out}")
    return 0


def _check_outputs(images: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Raise InputError where an output would overwrite another one or an input."""
    if len(set(outputs)) < len(outputs):
        raise InputError("two of the images share a name and would overwrite each other; predict them into two folders")
    inputs = {image.resolve() for image in images}
    for path in outputs:
        if path.resolve() in inputs:
            raise InputError(f"{path} is one of the images and would be overwritten; choose another --out")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name an image file") from error
