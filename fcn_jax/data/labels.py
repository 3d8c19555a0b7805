"""Class names, palettes and the reading of images and masks from encoded bytes."""

from __future__ import annotations

import contextlib
import io
import struct
from typing import Any

import cv2
import numpy as np

from fcn_jax.errors import InputError, UnreadableError

__all__ = [
    "CAMVID_CLASSES",
    "CAMVID_PALETTE",
    "IGNORE",
    "MOST_PIXELS",
    "VOC_CLASSES",
    "check_label",
    "check_pair",
    "decode_image",
    "decode_label",
    "encode_label",
    "palette_for",
    "voc_palette",
]

IGNORE = 255
"""The label of pixels that count neither in the loss nor in the scores."""

MOST_PIXELS = 2**27
"""Larger pictures (11585 x 11585) are not decoded: a header of a few bytes can claim any size, and reading takes up to
16 bytes a pixel."""

VOC_CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)
"""The 21 classes in the order of the VOC development kit (VOCinit.m), background first."""

CAMVID_CLASSES = tuple("sky building pole road pavement tree sign fence car pedestrian bicyclist".split())
"""The 11 classes in the order of the SegNet tutorial's label images."""

CAMVID_PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
"""RGB colours of the SegNet tutorial (Scripts/test_segmentation_camvid.py)."""

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"


def voc_palette(n: int = 256) -> np.ndarray:
    """Return the colour map of PASCAL VOC: the bits of the class id, dealt in turn to the top bits of R, G and B.

    Args:
        n: number of colours.

    Returns:
        uint8 (n, 3), RGB; row 0 is black, row 1 is (128, 0, 0).

    Source: VOClabelcolormap.m of the VOC development kit.
    """
    ids = np.arange(n)
    colours = np.zeros((n, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def palette_for(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Return the first ``num_classes`` VOC colours as plain (r, g, b) tuples in [0, 255]."""
    return tuple((int(r), int(g), int(b)) for r, g, b in voc_palette(num_classes))


def _unreadable(name: str, kind: str) -> UnreadableError:
    return UnreadableError(f"{name}: not a readable {kind}; the file may be cut short or of another type: replace it")


def _complete(data: bytes) -> bool:
    """Whether the end marker is there; some OpenCV versions return a half-grey picture for a file cut short.

    In a JPEG's coded data 0xFF is always followed by 0 or a restart marker, so after the last start-of-scan the end
    marker is found if and only if the file has it.
    """
    if data.startswith(_JPEG):
        return data.find(b"\xff\xd9", data.rfind(b"\xff\xda")) >= 0
    if data.startswith(_PNG):
        return _png_ends(data)
    return len(data) > 0


def _png_ends(data: bytes) -> bool:
    """Whether a PNG's chunks, each of the length that it says, lead to its end marker.

    OpenCV sets aside what a chunk says, up to 2 GiB, before it finds that the file is shorter.
    """
    at = len(_PNG)
    while data[at + 4 : at + 8] != b"IEND":
        if at + 12 > len(data):
            return False
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return at + 12 <= len(data)


def _open(data: bytes) -> Any:
    """Read an image's header with Pillow, by the plugin of its first bytes; None where it is of no type that we read.

    ``Image.open`` would ask all plugins, of which one runs Ghostscript, and warns of sizes that are allowed here.
    """
    # Here, so that PNG images and grey masks need OpenCV alone.
    try:
        from PIL import (
            BmpImagePlugin,
            GifImagePlugin,
            JpegImagePlugin,
            PngImagePlugin,
            PpmImagePlugin,
            TiffImagePlugin,
            WebPImagePlugin,
        )
    except ImportError as error:
        raise InputError("images that are not PNG need Pillow: pip install pillow") from error

    plugins: dict[bytes, Any] = {
        _PNG: PngImagePlugin.PngImageFile,
        _JPEG: JpegImagePlugin.JpegImageFile,
        b"BM": BmpImagePlugin.BmpImageFile,
        b"GIF8": GifImagePlugin.GifImageFile,
        b"II*\0": TiffImagePlugin.TiffImageFile,
        b"MM\0*": TiffImagePlugin.TiffImageFile,
        b"RIFF": WebPImagePlugin.WebPImageFile,
        **{b"P%d" % kind: PpmImagePlugin.PpmImageFile for kind in range(1, 7)},
    }
    plugin = next((plugin for start, plugin in plugins.items() if data.startswith(start)), None)
    return None if plugin is None else plugin(io.BytesIO(data))


def _size(data: bytes) -> tuple[int, int] | None:
    """Return width and height as the header has them; None where there is no such header."""
    if data.startswith(_PNG):
        return struct.unpack(">II", data[16:24]) if data[12:16] == b"IHDR" else None
    try:
        with contextlib.closing(_open(data)) as image:
            return image.size
    except InputError:
        raise
    except Exception:  # Pillow raises many kinds for a damaged header
        return None


def _check_size(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MOST_PIXELS:
        raise UnreadableError(
            f"{name}: its header says {size[0]} x {size[1]} pixels, and at most {MOST_PIXELS} are read; "
            "cut the picture into smaller ones"
        )


def _imdecode(data: bytes, flags: int, name: str, kind: str) -> np.ndarray:
    size = _size(data) if _complete(data) else None
    if size is None:
        raise _unreadable(name, kind)
    _check_size(size, name)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise _unreadable(name, kind) from error
    if image is None:
        raise _unreadable(name, kind)
    return image


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode an image file to RGB.

    Grey images are repeated over the channels, an alpha channel is dropped, 16-bit samples keep their upper eight
    bits, and an EXIF orientation is applied.

    Args:
        data: a whole JPEG, PNG, BMP, GIF, PNM, TIFF or WebP file.
        name: what an error calls the file.

    Returns:
        uint8 (h, w, 3), RGB in [0, 255].

    Raises:
        UnreadableError: the bytes are not a whole image, or more than ``MOST_PIXELS``.
    """
    image = _imdecode(data, cv2.IMREAD_COLOR, name, "image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def decode_label(data: bytes, name: str) -> np.ndarray:
    """Decode a mask file to class ids: the samples of a grey image, the indices of a palette image.

    Grey PNGs of 1, 2, 4 or 8 bits (and of 16 bits with values below 256) and palette images (PNG, GIF, BMP) are read.

    Args:
        data: the whole file.
        name: what an error calls the file.

    Returns:
        uint8 (h, w), class ids; the ids are not checked.

    Raises:
        InputError: an RGB or JPEG mask.
        UnreadableError: bytes that are not a whole image, or more than ``MOST_PIXELS``.
    """
    if data.startswith(_JPEG):
        raise InputError(f"{name}: a JPEG mask has no exact class ids; save masks as PNG")
    # OpenCV turns palette indices into colours, so palette images (colour type 3 of a PNG) go through Pillow.
    if not data.startswith(_PNG) or data[25:26] == b"\x03":
        return _decode_palette(data, name)
    label = _imdecode(data, cv2.IMREAD_UNCHANGED, name, "mask")
    if label.ndim != 2:
        raise _coloured(name)
    if label.dtype != np.uint8:
        if label.max() > IGNORE:
            raise InputError(
                f"{name}: mask value {label.max()} does not fit in 8 bits; masks hold class ids 0..254, 255 = ignore"
            )
        return label.astype(np.uint8)
    bits = data[24]  # OpenCV stretches samples of 1, 2 and 4 bits to 0..255
    return label // np.uint8(255 // (2**bits - 1)) if bits < 8 else label


def _coloured(name: str) -> InputError:
    return InputError(
        f"{name}: a mask with colour channels; expected one channel of class ids (or a palette image): "
        "map each colour to its class id and save as 8-bit PNG"
    )


def _decode_palette(data: bytes, name: str) -> np.ndarray:
    if not _complete(data):
        raise _unreadable(name, "mask")
    try:
        with contextlib.closing(_open(data)) as image:
            _check_size(image.size, name)
            mode = image.mode
            label = np.asarray(image)
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise _unreadable(name, "mask") from error
    if mode not in ("P", "L", "1"):
        raise _coloured(name)
    return label.astype(np.uint8)


def encode_label(label: np.ndarray) -> bytes:
    """Encode class ids, uint8 (h, w), as an 8-bit grey PNG."""
    done, data = cv2.imencode(".png", label)
    if not done:
        raise ValueError(f"expected a uint8 (h, w) label, got {label.dtype} {label.shape}")
    return data.tobytes()


def check_label(label: np.ndarray, num_classes: int, name: str) -> None:
    """Raise InputError where a label, uint8 (h, w), holds ids that are neither classes nor ``IGNORE``."""
    counts = np.bincount(label.ravel(), minlength=256)
    wrong = [int(i) for i in np.flatnonzero(counts[num_classes:IGNORE]) + num_classes]
    if wrong:
        shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
        raise InputError(
            f"{name}: class ids {shown} are not among the {num_classes} classes "
            f"(0..{num_classes - 1}, {IGNORE} = ignore); correct the mask or the list of classes"
        )


def check_pair(image: np.ndarray, label: np.ndarray, name: str) -> None:
    """Raise InputError where image (h, w, 3) and label (h, w) differ in size."""
    if image.shape[:2] != label.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], label.shape
        raise InputError(
            f"{name}: the image is {w} x {h} pixels, its mask {mask_w} x {mask_h}; they must be equal "
            "(an EXIF orientation is applied to the image)"
        )
