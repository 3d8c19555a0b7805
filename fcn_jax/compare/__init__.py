"""Comparing with PyTorch; torch is imported when something here is called, not before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fcn_jax.compare.compare import Report, compare, compare_arrays, compare_layers, first_over
from fcn_jax.compare.jax_side import make_jax_side
from fcn_jax.compare.measures import error_norm, measure, ulp_distance
from fcn_jax.compare.sides import Gradient, Side, TrainedStep
from fcn_jax.errors import InputError
from fcn_jax.models.fcn import FCN

if TYPE_CHECKING:
    import torch

__all__ = [
    "Gradient",
    "Report",
    "Side",
    "TrainedStep",
    "compare",
    "compare_arrays",
    "compare_layers",
    "error_norm",
    "first_over",
    "make_jax_side",
    "make_torch_side",
    "make_twin",
    "measure",
    "ulp_distance",
]


def make_twin(model: FCN) -> torch.nn.Module:
    """Build the PyTorch network that computes what ``model`` computes, see ``twins.make_twin``.

    Raises:
        InputError: torch is not installed.
    """
    _need_torch()
    from fcn_jax.compare import twins

    return twins.make_twin(model)


def make_torch_side(module: torch.nn.Module, *args: Any, **options: Any) -> Side:
    """Make one side of a comparison of any PyTorch module, see ``torch_side.make_torch_side``.

    Raises:
        InputError: torch is not installed.
    """
    _need_torch()
    from fcn_jax.compare import torch_side

    return torch_side.make_torch_side(module, *args, **options)


def _need_torch() -> None:
    try:
        import torch  # noqa: F401  (named in the error before an import of ours can fail)
    except ImportError as error:
        raise InputError("comparing with PyTorch needs torch; pip install 'fcn_jax[torch]'") from error
