"""Encoders trained on ImageNet, by name: fetched once into torch.hub's cache, which torchvision uses too."""

from __future__ import annotations

import hashlib
import http.client
from pathlib import Path
from typing import Any

from fcn_jax.errors import InputError

_TORCHVISION = "https://download.pytorch.org/models"
_JOHNSON = "https://web.eecs.umich.edu/~justincj/models"
PRETRAINED = {
    "vgg11-imagenet": f"{_TORCHVISION}/vgg11-8a719046.pth",
    "vgg11_bn-imagenet": f"{_TORCHVISION}/vgg11_bn-6002323d.pth",
    "vgg13-imagenet": f"{_TORCHVISION}/vgg13-19584684.pth",
    "vgg13_bn-imagenet": f"{_TORCHVISION}/vgg13_bn-abd245e5.pth",
    "vgg16-imagenet": f"{_TORCHVISION}/vgg16-397923af.pth",
    "vgg16_bn-imagenet": f"{_TORCHVISION}/vgg16_bn-6c64b313.pth",
    "vgg19-imagenet": f"{_TORCHVISION}/vgg19-dcbb9e9d.pth",
    "vgg19_bn-imagenet": f"{_TORCHVISION}/vgg19_bn-c79401a0.pth",
    "vgg16-caffe": f"{_JOHNSON}/vgg16-00b39a1b.pth",
    "vgg19-caffe": f"{_JOHNSON}/vgg19-d01eb7cb.pth",
}
"""Addresses by name: torchvision's IMAGENET1K_V1 (``models/vgg.py``), and the VGG authors' Caffe weights as jcjohnson's
pytorch-vgg converted them. A file's name ends in the first eight hexadecimal digits of its SHA-256."""


def fetch(name: str) -> Path:
    """Return the file of a key of ``PRETRAINED``; download it where torch.hub's cache has none.

    Raises:
        InputError: torch is missing, there is no network, or the file is not the one that was published.
    """
    url = PRETRAINED[name]
    filename = url.rpartition("/")[2]
    expected = filename.removesuffix(".pth").rpartition("-")[2]
    hub = import_torch(name).hub
    path = Path(hub.get_dir()) / "checkpoints" / filename
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(url, str(path), hash_prefix=expected)
            return path
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: another SHA-256
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{name}: {url} cannot be fetched ({reason}); fetch it elsewhere and put it at {path}, or give its path"
        ) from error
    if not found.startswith(expected):
        raise InputError(f"{path}: its SHA-256 is {found[:8]}..., expected {expected}...; remove it, to fetch it again")
    return path


def import_torch(what: object) -> Any:
    """Return torch; the error where it is not installed begins with ``what``."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{what}: torch files need torch: pip install fcn_jax[torch], or use a .safetensors file"
        ) from error
    return torch
