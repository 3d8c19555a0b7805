"""Download and unpack the archives of VOC and SBD."""

from __future__ import annotations

import logging
import os
import tarfile
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from fcn_jax.download import check_digest
from fcn_jax.download import download as download_file
from fcn_jax.errors import InputError, first_line

_log = logging.getLogger(__name__)
_MOST_GROWTH = 50  # limit on unpacked size / archive size; VOC's archives are not compressed, SBD's is below 2


@dataclass(frozen=True)
class Archive:
    """A tar file to download, and the folder inside it that contains the data set."""

    url: str
    md5: str
    content: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[-1]


_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_BERKELEY = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping"
ARCHIVES = {
    "voc2012": Archive(
        f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd", "VOCdevkit/VOC2012"
    ),
    "voc2011": Archive(
        f"{_VOC}/voc2011/VOCtrainval_25-May-2011.tar", "6c3384ef61512963050cb5d687e5bf1e", "TrainVal/VOCdevkit/VOC2011"
    ),
    "sbd": Archive(
        f"{_BERKELEY}/semantic_contours/benchmark.tgz", "82b4d87ceb2ed10f6038a1cba92111cb", "benchmark_RELEASE"
    ),
}
"""URLs and checksums from torchvision's datasets/voc.py and datasets/sbd.py."""


def fetch(archive: Archive, folder: Path, download: bool) -> Path:
    """Return ``folder``/``archive.content``; download the archive and unpack it atomically if it is missing.

    An archive that is already in ``folder`` is not downloaded again.

    Raises:
        InputError: ``download`` is False, or the archive cannot be fetched, checked or unpacked.
    """
    if not download:
        raise InputError(
            f"--data.dir {folder}: contains no {archive.content} with images and masks; "
            f"unpack {archive.name} there or give --data.download"
        )
    place = folder / archive.content
    if place.is_dir():
        return place
    target = folder / archive.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not target.is_file():
            _log.info("fetching %s", archive.url)
            download_file(archive.url, target, f"md5:{archive.md5}")
        else:
            check_digest(target, f"md5:{archive.md5}", target, "remove it and fetch it again")
        _log.info("unpacking %s", target)
        left = _MOST_GROWTH * target.stat().st_size
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder, ignore_cleanup_errors=True) as work:
            with tarfile.open(target) as tar:
                for member in tar:
                    left -= member.size
                    if left < 0:
                        raise tarfile.TarError(f"it unpacks to more than {_MOST_GROWTH} times its size")
                    tar.extract(member, work, filter="data")
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_dir():
                os.replace(Path(work, archive.content), place)
    except InputError:
        raise
    except (tarfile.TarError, zlib.error, EOFError, ValueError, OverflowError) as error:  # raised for damaged files
        raise InputError(f"{target}: cannot be unpacked ({first_line(error)}); remove it and fetch it again") from error
    except OSError as error:
        raise InputError(
            f"--data.dir {folder}: cannot be written to, or {target} does not contain {archive.content} ({error})"
        ) from error
    return place
