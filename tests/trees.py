"""Tiny data sets in the exact formats of the originals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy.io import savemat

from fcn_jax.data.io import palette


def picture(seed: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    """A random RGB image, uint8 (h, w, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def mask(seed: int, num_classes: int, size: tuple[int, int] = (12, 16), ignore: int = 255) -> np.ndarray:
    """A random label, uint8 (h, w), with one row of ``ignore``."""
    label = np.random.default_rng([seed, 1]).integers(0, num_classes, size).astype(np.uint8)
    label[0] = ignore
    return label


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an RGB image in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def write_mask(path: Path, label: np.ndarray) -> None:
    """Write an 8-bit grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), label)


def write_palette_mask(path: Path, label: np.ndarray) -> None:
    """Write a palette PNG as in VOC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label)
    image.putpalette([value for colour in palette(256) for value in colour])  # changes the mode to P
    image.save(path)


def write_list(path: Path, names: Sequence[str]) -> None:
    """Write one name in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def camvid(root: Path, counts: dict[str, int], suffix: str = ".png", size: tuple[int, int] = (12, 16)) -> Path:
    """A CamVid tree; frames of val start at seed 100, of test at 200."""
    for part, start in (("train", 0), ("val", 100), ("test", 200)):
        for i in range(counts.get(part, 0)):
            name = f"{part}_{i:03d}"
            write_image(root / part / f"{name}{suffix}", picture(start + i, size))
            write_mask(root / f"{part}annot" / f"{name}.png", mask(start + i, 11, size, ignore=11))
    return root


def voc(root: Path, year: str, splits: dict[str, Sequence[str]]) -> Path:
    """A VOCdevkit/VOC<year> under ``root`` with the given lists; returns its folder."""
    tree = root / "VOCdevkit" / f"VOC{year}"
    for split, names in splits.items():
        write_list(tree / "ImageSets/Segmentation" / f"{split}.txt", names)
        for name in names:
            seed = int(name[-3:])
            write_image(tree / "JPEGImages" / f"{name}.jpg", picture(seed))
            write_palette_mask(tree / "SegmentationClass" / f"{name}.png", mask(seed, 21))
    return tree


def boundaries(shape: tuple[int, int]) -> np.ndarray:
    """Return GTcls.Boundaries of an SBD mask, an array per class; our reader ignores it."""
    found = np.empty((20, 1), object)
    found[:] = [[np.zeros(shape, np.uint8)]] * 20
    return found


def sbd(root: Path, splits: dict[str, Sequence[str]]) -> Path:
    """A benchmark_RELEASE under ``root``, .mat files with GTcls as in the release; returns its dataset folder."""
    tree = root / "benchmark_RELEASE/dataset"
    (tree / "cls").mkdir(parents=True)
    for split, names in splits.items():
        write_list(tree / f"{split}.txt", names)
        for name in names:
            seed = int(name[-3:])
            write_image(tree / "img" / f"{name}.jpg", picture(seed))
            label = mask(seed, 21, ignore=0)
            truth = {"Boundaries": boundaries(label.shape), "Segmentation": label}
            truth["CategoriesPresent"] = np.unique(label)[:, None]
            savemat(tree / "cls" / f"{name}.mat", {"GTcls": truth}, do_compression=True)
    return tree


def folder(
    root: Path, counts: dict[str, int], classes: Sequence[str] = ("background", "cat", "dog"), flat: bool = False
) -> Path:
    """A user's folder, as SPLIT/images and SPLIT/masks or (``flat``) as images/SPLIT and masks/SPLIT."""
    write_list(root / "classes.txt", classes)
    for start, (split, count) in enumerate(counts.items()):
        images, masks = (f"images/{split}", f"masks/{split}") if flat else (f"{split}/images", f"{split}/masks")
        for i in range(count):
            write_image(root / images / f"{i:03d}.jpg", picture(100 * start + i))
            write_mask(root / masks / f"{i:03d}.png", mask(100 * start + i, len(classes)))
    return root
