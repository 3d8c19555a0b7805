"""Compare networks with PyTorch. Only ``import_torch_adapter`` imports torch, and only when it is called."""

from __future__ import annotations

from typing import Any

from fcn_jax.compare.jax_adapter import make_jax_side
from fcn_jax.compare.parity import (
    Gradient,
    Report,
    Side,
    TrainedStep,
    compare,
    compare_arrays,
    error_norm,
    first_over,
    measure,
    ulp_distance,
)
from fcn_jax.errors import InputError
from fcn_jax.models.fcn import FCN

__all__ = [
    "Gradient",
    "Report",
    "Side",
    "TrainedStep",
    "compare",
    "compare_arrays",
    "error_norm",
    "first_over",
    "import_torch_adapter",
    "make_jax_side",
    "make_torch_side",
    "make_twin",
    "measure",
    "ulp_distance",
]


def import_torch_adapter() -> Any:
    """Import the module ``torch_adapter``; raise an InputError if torch is not installed."""
    try:
        import torch  # noqa: F401  (alone, so that an import error of our own is not reported as a missing torch)
    except ImportError as error:
        message = "comparing with PyTorch needs torch; run pip install 'fcn_jax[torch]', or bench with --against none"
        raise InputError(message) from error
    from fcn_jax.compare import torch_adapter

    return torch_adapter


def make_twin(model: FCN) -> Any:
    """Build the ``torch.nn.Module`` equivalent to ``model``; see ``twins.make_twin``."""
    return import_torch_adapter().make_twin(model)


def make_torch_side(module: Any, *args: Any, **options: Any) -> Side:
    """Make one side of a comparison from any ``torch.nn.Module``; see ``torch_adapter.make_torch_side``."""
    return import_torch_adapter().make_torch_side(module, *args, **options)
