"""Comparing with PyTorch; torch is imported when something here is called, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fcn_jax.errors import InputError
from fcn_jax.models.fcn import FCN

if TYPE_CHECKING:
    import torch

__all__ = ["make_twin"]


def make_twin(model: FCN) -> torch.nn.Module:
    """Build the PyTorch network that computes what ``model`` computes, see ``torch_twin.make_twin``.

    Raises:
        InputError: torch is not installed.
    """
    try:
        import torch  # noqa: F401  (named in the error before the twin's own import can fail)
    except ImportError as error:
        raise InputError("the PyTorch twin needs torch; pip install 'fcn_jax[torch]'") from error
    from fcn_jax.numerics import torch_twin

    return torch_twin.make_twin(model)
