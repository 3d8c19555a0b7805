"""Files of a data set: listing of the images and masks of a split, reading and decoding."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from fcn_jax.config import DataConfig
from fcn_jax.errors import InputError, UnreadableError, first_line
from fcn_jax.losses import IGNORE
from fcn_jax.paths import to_path

# Pillow tries only these formats; others are unsafe: its EPS plugin runs Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


NPY = b"\x93NUMPY"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Entry:
    """One example: a name for messages and figures, and its files (None if it is generated)."""

    name: str
    image: Path | None = None
    label: Path | None = None


@dataclass(frozen=True)
class Listing:
    """One split of a data set, not yet read."""

    dataset: str
    split: str
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    entries: tuple[Entry, ...]
    read: Callable[[Entry], tuple[bytes, np.ndarray]]
    """Returns the encoded image and the label, uint8 (h, w), of class ids with 255 = ignore."""
    unreadable: Literal["error", "skip"] = "error"
    """Whether an unreadable file raises an error, or its entry is skipped."""
    channels: int | None = None
    """Number of channels of images that are not 8-bit RGB."""
    version: str = ""
    """Version and options of a generator or converter that affect what ``read`` returns."""

    @property
    def spec(self) -> str:
        """DATASET/SPLIT."""
        return f"{self.dataset}/{self.split}"


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; raise UnreadableError if it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UnreadableError(
            f"{path}: cannot be read ({reason}); put the file there or correct --data.dir (eval.py: --dir)"
        ) from error


def lines_in(path: Path, what: str) -> list[str]:
    """Return the non-blank lines of a file with one ``what`` per line; raise InputError if it is not UTF-8."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file; write one {what} per line") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_files(entry: Entry) -> tuple[bytes, np.ndarray]:
    """Read an entry whose mask is an image file of class ids."""
    assert entry.image is not None and entry.label is not None  # every data set of files gives both
    return read_bytes(entry.image), decode_label(read_bytes(entry.label), str(entry.label))


def folder_of(config: DataConfig, dataset: str, content: str) -> Path:
    """Return ``config.dir``; raise InputError if it is not set, or does not exist and downloads are off."""
    if config.dir is None:
        raise InputError(f"{dataset} needs the folder that contains {content}: give --data.dir (eval.py: --dir)")
    folder = to_path(config.dir, "--data.dir")
    if not folder.is_dir() and not config.download:
        raise InputError(f"--data.dir {folder}: no such folder; give the one that contains {content}")
    return folder


def names_in(path: Path) -> tuple[str, ...]:
    """Return the names in a list file, one per line; raise InputError if the file is missing or empty."""
    names = tuple(line.split()[0] for line in lines_in(path, "name"))
    if not names:
        raise InputError(f"{path}: lists no images; write one name per line")
    return names


def pairs_by_name(
    images: Path, masks: Path, image_suffixes: tuple[str, ...], mask_suffixes: tuple[str, ...]
) -> tuple[Entry, ...]:
    """Pair the files of two folders by file name without suffix, sorted by name.

    Raises:
        InputError: a folder is missing or empty, two files share a name, or a file has no partner.
    """
    image_of, label_of = _by_stem(images, image_suffixes), _by_stem(masks, mask_suffixes)
    for one, other, here, there in (
        (image_of, label_of, images, f"mask in {masks}"),
        (label_of, image_of, masks, f"image in {images}"),
    ):
        if alone := sorted(one.keys() - other.keys()):
            raise InputError(
                f"{here}: {alone[0]!r} has no {there} ({len(alone)} in total); an image and its mask must have the "
                "same name, as in a.jpg and a.png"
            )
    return tuple(Entry(stem, image_of[stem], label_of[stem]) for stem in sorted(image_of))


def _by_stem(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; create it or correct --data.dir (eval.py: --dir)")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if not path.name.isprintable():  # names are stored and printed, which fails for bytes that are not UTF-8
                raise InputError(f"{folder}: {ascii(path.name)} is not a printable name; rename it")
            if path.stem in found:
                raise InputError(f"{folder}: {found[path.stem].name} and {path.name} share a name; remove one of them")
            found[path.stem] = path
    if not found:
        raise InputError(
            f"{folder}: contains no {' '.join(suffixes)} files; put them there or correct --data.dir (eval.py: --dir)"
        )
    return found


def _unreadable(name: str, kind: str, reason: str) -> UnreadableError:
    return UnreadableError(f"{name}: not a readable {kind} ({reason}); replace the file")


def _open(data: bytes, name: str, kind: str) -> Image.Image:
    """Decode a whole file with Pillow, which rejects truncated files and images above its pixel limit."""
    try:
        # OpenCV allocates the size that a PNG chunk claims, up to 2 GiB; this checks lengths and checksums.
        Image.open(io.BytesIO(data), formats=_FORMATS).verify()
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        image.load()
        pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    except Exception as error:  # Pillow raises many exception types for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        raise _unreadable(name, kind, "damaged or of an unsupported type" if unknown else first_line(error)) from error
    if pages > 1:
        raise InputError(f"{name}: a TIFF file with {pages} pages; if they are channels, give --data.channels {pages}")
    return image


def _decode(data: bytes, flags: int, name: str, kind: str) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise _unreadable(name, kind, "OpenCV cannot decode it")
    return image


def decode_image(data: bytes, name: str, verify: bool = True) -> np.ndarray:
    """Decode a JPEG, PNG, BMP, GIF, PNM, TIFF or WebP file to RGB, uint8 (h, w, 3).

    Grey images are repeated over the channels, an alpha channel is dropped, 16-bit samples keep their upper eight
    bits, and an EXIF orientation is applied.

    Args:
        data: the whole file.
        name: file name for error messages.
        verify: decode the file with Pillow first, since OpenCV may return part of a truncated image or allocate any
            amount of memory. Images in a prepared copy are already verified.

    Raises:
        UnreadableError: an incomplete or invalid image, or one larger than Pillow allows (``Image.MAX_IMAGE_PIXELS``).
    """
    if verify:
        _open(data, name, "image")
    elif data.startswith(NPY):
        return _from_npy(data, name)  # written by ``encode_array``
    return cv2.cvtColor(_decode(data, cv2.IMREAD_COLOR, name, "image"), cv2.COLOR_BGR2RGB)


def _grey(image: Image.Image) -> Image.Image | None:
    """Return the first channel of an image if its colour channels are equal, else None."""
    red, green, blue = image.split()[:3]
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else None


def decode_channels(data: bytes, name: str, channels: int) -> np.ndarray:
    """Decode an image with any number of channels, uint8 or uint16 (h, w, channels).

    Args:
        data: the whole file: .npy, TIFF (channels last, first, or as pages), or any OpenCV format (RGB or RGBA).
        name: file name for error messages.
        channels: expected number of channels.

    Raises:
        InputError: a TIFF compression that needs imagecodecs.
        UnreadableError: an incomplete or invalid image, or an unexpected number of channels or bits.
    """
    if data.startswith(NPY):
        image = _from_npy(data, name)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        image = _from_tiff(data, name)
    else:
        _open(data, name, "image")
        # OpenCV applies an EXIF orientation only if it may drop the alpha channel; JPEG has none.
        flags = cv2.IMREAD_UNCHANGED if channels == 4 else cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
        image = _decode(data, flags, name, "image")
        if image.ndim == 3:
            image[..., :3] = image[..., 2::-1].copy()
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim == 3 and image.shape[-1] != channels == image.shape[0]:
        image = np.moveaxis(image, 0, -1)
    if image.ndim != 3 or image.shape[-1] != channels or image.dtype not in (np.uint8, np.uint16) or not image.size:
        raise UnreadableError(
            f"{name}: {image.dtype} of shape {image.shape}; expected uint8 or uint16 (height, width, {channels}): "
            "correct the file, or --data.channels in training"
        )
    return np.ascontiguousarray(image)


def _from_npy(data: bytes, name: str) -> np.ndarray:
    try:
        image = np.load(io.BytesIO(data), allow_pickle=False)
        return image.astype(image.dtype.newbyteorder("="), copy=False)
    except Exception as error:  # a damaged header may raise anything
        raise _unreadable(name, "image", first_line(error)) from error


def _from_tiff(data: bytes, name: str) -> np.ndarray:
    import tifffile

    try:
        return tifffile.imread(io.BytesIO(data))
    except Exception as error:  # tifffile raises many exception types for damaged files
        if "imagecodecs" in str(error):
            raise InputError(f"{name}: its compression needs another package: pip install imagecodecs") from error
        raise _unreadable(name, "image", first_line(error)) from error


def encode_array(array: np.ndarray) -> bytes:
    """Encode an array as a .npy file, which ``decode_image`` decodes."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def decode_label(data: bytes, name: str, verify: bool = True) -> np.ndarray:
    """Decode a PNG, GIF, BMP or TIFF mask to class ids, uint8 (h, w): grey samples or palette indices.

    Args:
        data: the whole file; grey images of 1, 2, 4 or 8 bits, or of 16 bits with values below 256.
        name: file name for error messages.
        verify: False for output of ``encode_label``, which OpenCV alone decodes faster.

    Raises:
        InputError: an RGB or JPEG mask.
        UnreadableError: an incomplete or invalid image, or one larger than Pillow allows.
    """
    if not verify:
        return _decode(data, cv2.IMREAD_GRAYSCALE, name, "mask")
    image = _open(data, name, "mask")
    if image.format in ("JPEG", "MPO"):
        raise InputError(f"{name}: a JPEG mask has no exact class ids; save masks as PNG")
    if image.mode in ("RGB", "RGBA") and (grey := _grey(image)) is not None:
        image = grey
    if image.mode in ("I", "F", "I;16B"):
        raise InputError(f"{name}: a mask of 16 or 32 bits, mode {image.mode}; save its class ids as 8-bit PNG")
    if image.mode not in ("P", "L", "1", "I;16"):
        raise InputError(
            f"{name}: a mask with colour channels; expected one channel of class ids (or a palette image): "
            "map each colour to its class id and save as 8-bit PNG, or give the colours in classes.txt (NAME #RRGGBB)"
        )
    label = np.asarray(image)
    if image.mode == "I;16" and label.max() > IGNORE:
        raise InputError(
            f"{name}: mask value {label.max()} does not fit in 8 bits; masks contain class ids 0..254, 255 = ignore"
        )
    label = label.astype(np.uint8)
    if image.format == "PNG" and image.mode == "L" and data[24] < 8:  # the bits per sample in a PNG's header
        label //= np.uint8(255 // (2 ** data[24] - 1))  # Pillow scales samples of 2 and 4 bits to 0..255
    return label


def decode_colors(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Decode a colour mask to RGB, uint8 (h, w, 3), and its palette indices (h, w), if any; None for a grey mask.

    Raises:
        InputError: a JPEG mask.
        UnreadableError: as ``decode_label``.
    """
    image = _open(data, name, "mask")
    if image.mode not in ("RGB", "RGBA", "P"):
        return None
    if image.format in ("JPEG", "MPO"):
        raise InputError(f"{name}: a JPEG mask has no exact colours; save masks as PNG")
    return np.asarray(image.convert("RGB")), np.asarray(image) if image.mode == "P" else None


def encode_label(label: np.ndarray) -> bytes:
    """Encode class ids, uint8 (h, w), as an 8-bit grey PNG."""
    return cv2.imencode(".png", label)[1].tobytes()


def palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Return the colour map of PASCAL VOC (VOClabelcolormap.m), (r, g, b) in [0, 255] for each class."""
    # The bits of the class id are assigned in turn to R, G and B, starting at their highest bits.
    ids = np.arange(num_classes)
    bits = np.arange(8)
    channels = [((ids[:, None] >> (3 * bits + c) & 1) << (7 - bits)).sum(1).tolist() for c in range(3)]
    return tuple(zip(*channels, strict=True))
