"""Published weights by name: address, network, score and licence, and their download."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fcn_jax.download import check_digest, download
from fcn_jax.errors import InputError, first_line
from fcn_jax.paths import is_remote, state_of, to_path

_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
HUB_FILE = "model.safetensors"
"""The weights file in a hub repository, or in a folder of ``fcn-jax export --format hub``."""


@dataclass(frozen=True)
class Pretrained:
    """A published weights file."""

    network: str
    """A key of ``MODELS``, or the name of an encoder."""
    address: str
    """A URL or ``hf://OWNER/REPO[@REVISION]``."""
    data: str
    """What it was trained on."""
    score: str
    """Mean IoU in per cent, with its split; for an encoder top-1 accuracy on ImageNet."""
    licence: str
    digest: str | None = None
    """See ``download.check_digest``; None if none was published."""

    @property
    def is_encoder(self) -> bool:
        """Whether it holds only an encoder."""
        return not self.network.startswith("fcn")


_BERKELEY = "http://dl.caffe.berkeleyvision.org"
_TORCHVISION = "https://download.pytorch.org/models"
_JOHNSON = "https://web.eecs.umich.edu/~justincj/models"
# Name, network, file, mean IoU on seg11valid (Shelhamer, Long & Darrell 2017; README of the reference), digest. The
# digest of the 8s is that of opencv_extra's download_models.py.
_FCN = (
    ("fcn32s-voc-caffe", "fcn32s_pad100", "fcn32s-heavy-pascal", "63.63", None),
    ("fcn16s-voc-caffe", "fcn16s_pad100", "fcn16s-heavy-pascal", "65.01", None),
    ("fcn8s-voc-caffe", "fcn8s_pad100", "fcn8s-heavy-pascal", "65.51", "sha1:c449ea74dd7d83751d1357d6a8c323fcf4038962"),
    ("fcn8s_atonce-voc-caffe", "fcn8s_pad100_atonce", "fcn8s-atonce-pascal", "65.40", None),
)
# Encoder and top-1 accuracy of IMAGENET1K_V1 (torchvision's models/vgg.py and models/resnet.py).
_ENCODERS = {
    "vgg11": "69.02", "vgg11_bn": "70.37", "vgg13": "69.93", "vgg13_bn": "71.59", "vgg16": "71.59", "vgg16_bn": "73.36",
    "vgg19": "72.38", "vgg19_bn": "74.22", "resnet50": "76.13", "resnet101": "77.37",
}  # fmt: skip

PRETRAINED: dict[str, Pretrained] = {
    **{
        name: Pretrained(
            network, f"{_BERKELEY}/{file}.caffemodel", "SBD train", f"{score} seg11valid", "not stated", digest
        )
        for name, network, file, score, digest in _FCN
    },
    "fcn_resnet50-coco": Pretrained(
        "fcn_resnet50", f"{_TORCHVISION}/fcn_resnet50_coco-1167a1af.pth", "COCO, VOC's 21 classes",
        "60.5 COCO val", "BSD-3-Clause", "sha256:1167a1af",
    ),
    "fcn_resnet101-coco": Pretrained(
        "fcn_resnet101", f"{_TORCHVISION}/fcn_resnet101_coco-7ecb50ca.pth", "COCO, VOC's 21 classes",
        "63.7 COCO val", "BSD-3-Clause", "sha256:7ecb50ca",
    ),
    **{
        f"{encoder}-imagenet": Pretrained(encoder, f"hf://timm/{encoder}.tv_in1k", "ImageNet", score, "BSD-3-Clause")
        for encoder, score in _ENCODERS.items()
    },
    "vgg16-caffe": Pretrained(
        "vgg16", f"{_JOHNSON}/vgg16-00b39a1b.pth", "ImageNet", "not stated", "CC-BY-4.0", "sha256:00b39a1b"
    ),
    "vgg19-caffe": Pretrained(
        "vgg19", f"{_JOHNSON}/vgg19-d01eb7cb.pth", "ImageNet", "not stated", "CC-BY-4.0", "sha256:d01eb7cb"
    ),
}  # fmt: skip
"""The FCN authors' networks; torchvision's; torchvision's encoders as timm publishes them; the VGG authors' Caffe
encoders as jcjohnson's pytorch-vgg converted them."""


def is_published(source: str) -> bool:
    """Return whether a source is a published name or hf:// address, and not a path."""
    return source in PRETRAINED or source.startswith("hf://")


def fetch(name: str) -> Path:
    """Return the file of a key of ``PRETRAINED``, ``hf://OWNER/REPO[@REVISION]`` or ``gs://...``, downloaded once.

    Files from the hub are cached by huggingface_hub, all others in the cache of torch.hub, which torchvision shares.

    Raises:
        InputError: the download fails, or the file is not the published one.
    """
    if is_remote(name):
        return _from_bucket(name)
    entry = PRETRAINED.get(name)
    address = name if entry is None else entry.address
    if address.startswith("hf://"):
        return _from_hub(name, address)
    home = os.environ.get("TORCH_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "torch"))
    path = Path(home).expanduser() / "hub" / "checkpoints" / address.rpartition("/")[2]
    digest = entry.digest if entry else None
    try:
        if path.is_file() and digest:
            check_digest(path, digest, path, "remove it, to fetch it again")
        return download(address, path, digest)
    except InputError as error:
        raise InputError(f"{name}: {error}, or give its path") from error


def _from_bucket(name: str) -> Path:
    source = to_path(name, "weights")
    try:
        key = hashlib.sha256(f"{name}\0{state_of(source)}".encode()).hexdigest()[:16]
        target = Path("~/.cache/fcn_jax/weights").expanduser() / key / source.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{os.getpid()}.partial")
            partial.write_bytes(source.read_bytes())
            partial.replace(target)
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({first_line(error)}); check the path") from error
    return target


def _from_hub(name: str, address: str) -> Path:
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # the last attempt's error is reported below
    if not (match := _HUB.fullmatch(address)):
        raise InputError(f"{name}: expected hf://OWNER/REPO or hf://OWNER/REPO@REVISION")
    try:
        return Path(huggingface_hub.hf_hub_download(match[1], HUB_FILE, revision=match[2]))
    except Exception as error:  # includes those of the HTTP client, which depends on huggingface_hub's version
        reasons = {
            "GatedRepoError": "its owner has to grant you access: ask there, then `hf auth login`",
            "RepositoryNotFoundError": "there is no such repository, or it is private: `hf auth login`",
            "RevisionNotFoundError": f"the repository has no revision {match[2]}",
            "RemoteEntryNotFoundError": f"the repository has no {HUB_FILE}",
        }
        reason = reasons.get(type(error).__name__, first_line(error))
        way_out = f"check the name and the network, or fetch {HUB_FILE} elsewhere and give its path"
        raise InputError(f"{name}: {HUB_FILE} of {address} cannot be fetched ({reason}); {way_out}") from error
