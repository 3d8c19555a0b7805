"""PASCAL VOC segmentation: 21 classes, the 2012 splits, and seg11valid, on which the FCN paper reports.

Expected under ``--data.dir``: ``VOCdevkit/VOC2012`` with ``JPEGImages``, ``SegmentationClass`` and
``ImageSets/Segmentation``; ``--data.dir`` may also be ``VOCdevkit`` or ``VOC2012`` itself. ``seg11valid`` has the 736
images of VOC2011's val that are not in SBD's train. It is read from ``ImageSets/Segmentation/seg11valid.txt`` if that
exists, else derived from VOC2011 and SBD in the same folder.
"""

from __future__ import annotations

from pathlib import Path

from fcn_jax.config import DataConfig
from fcn_jax.data.download import ARCHIVES, fetch
from fcn_jax.data.io import Entry, Listing, folder_of, names_in, palette, read_files
from fcn_jax.errors import InputError
from fcn_jax.paths import absolute

CLASSES = tuple(
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor".split()
)
"""The 21 classes in the order of the VOC development kit (VOCinit.m), background first."""

SPLITS = ("train", "val", "trainval", "seg11valid")
_SETS = Path("ImageSets/Segmentation")


def find(folder: Path, year: str) -> Path | None:
    """Return the VOC folder of ``year`` inside, at or next to ``folder``, or None."""
    tree = f"VOC{year}"
    # VOC2011's archive has its VOCdevkit in a folder TrainVal.
    places = [folder / tree, folder / "VOCdevkit" / tree, folder / "TrainVal/VOCdevkit" / tree]
    places += [folder] if absolute(folder).name == tree else [absolute(folder).parent / tree]
    return next((place for place in places if (place / "SegmentationClass").is_dir()), None)


def find_sbd(folder: Path) -> Path | None:
    """Return SBD's ``dataset`` folder inside, at or next to ``folder``, or None."""
    places = [folder, folder / "dataset", folder / "benchmark_RELEASE/dataset"]
    # Next to ROOT/TrainVal/VOCdevkit/VOC2011.
    places += [up / "benchmark_RELEASE/dataset" for up in absolute(folder).parents[:3]]
    return next((place for place in places if (place / "cls").is_dir() and (place / "img").is_dir()), None)


def _seg11valid(folder: Path, config: DataConfig) -> tuple[Path, tuple[str, ...]]:
    """Return the VOC folder and the names of seg11valid; VOC2012 has all images and masks of VOC2011."""
    for year in ("2012", "2011"):
        root = find(folder, year)
        if root is not None and (root / _SETS / "seg11valid.txt").is_file():
            return root, names_in(root / _SETS / "seg11valid.txt")
    sbd_root = find_sbd(folder)
    if not config.download and (sbd_root is None or find(folder, "2011") is None):
        raise InputError(
            f"--data.dir {folder}: seg11valid needs VOCdevkit/VOC2012/{_SETS}/seg11valid.txt (its 736 names), "
            "or VOCdevkit/VOC2011 and benchmark_RELEASE (SBD) to derive that list from; "
            "put one of them there or give --data.download"
        )
    root = find(folder, "2011") or fetch(ARCHIVES["voc2011"], folder, config.download)
    sbd_root = sbd_root or fetch(ARCHIVES["sbd"], folder, config.download) / "dataset"
    trained_on = set(names_in(sbd_root / "train.txt"))
    names = tuple(name for name in names_in(root / _SETS / "val.txt") if name not in trained_on)
    if not names:
        raise InputError(f"{root / _SETS / 'val.txt'}: every image is in SBD's train.txt too; check the two lists")
    return root, names


def listing(split: str, config: DataConfig) -> Listing:
    """List a split of VOC2012, or seg11valid of VOC2011."""
    folder = folder_of(config, "voc", "VOCdevkit")
    if split == "seg11valid":
        root, names = _seg11valid(folder, config)
    else:
        root = find(folder, "2012") or fetch(ARCHIVES["voc2012"], folder, config.download)
        names = names_in(root / _SETS / f"{split}.txt")
    entries = tuple(
        Entry(name, root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names
    )
    return Listing("voc", split, CLASSES, palette(len(CLASSES)), entries, read_files)
