"""Any PyTorch segmentation module as one side of a comparison, on the CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcn_jax.compare.sides import Arrays, Gradient, Side, TrainedStep
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError, unknown
from fcn_jax.losses import IGNORE

__all__ = ["make_torch_side"]

_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
_DTYPES = {"float64": torch.float64, "float32": torch.float32}


def make_torch_side(
    module: nn.Module,
    optim: OptimConfig | None = None,
    *,
    name: str = "torch",
    dtype: str = "float32",
    channels_last: bool = False,
    names: Mapping[str, str] | None = None,
    aux_weight: float = 0.4,
) -> Side:
    """Make the side of a module: images (b, 3, h, w) -> logits (b, num_classes, h, w), or (logits, auxiliary logits).

    The module itself is not touched; its copies run with dropout off.

    Args:
        module: any segmentation network; convolutions, transposed convolutions and batch norms are its layers.
        optim: of the training, at a fixed rate for all parameters; by default ``OptimConfig()``.
        name: what reports call this side.
        dtype: "float64", "float32", or "bfloat16" (autocast over float32 parameters).
        channels_last: keep images and kernels in torch's other memory format.
        names: the other side's name of a submodule, by the module's own; submodules not named keep theirs.
        aux_weight: weight of the auxiliary logits' loss.
    """
    if dtype not in ("float64", "float32", "bfloat16"):
        raise unknown("dtype", dtype, ("float64", "float32", "bfloat16"))
    run = _Run(module, optim or OptimConfig(), dtype, channels_last, dict(names or {}), aux_weight)
    return Side(name, run.layers, run.gradient, run.train)


def _numpy(x: Tensor) -> np.ndarray:
    """Copy a tensor; NumPy knows bfloat16 by ml_dtypes, to which torch does not convert."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.float().numpy().astype(ml_dtypes.bfloat16)
    return np.array(x.numpy())


class _Run:
    """What the callables of one side share."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        dtype: str,
        channels_last: bool,
        names: dict[str, str],
        aux_weight: float,
    ) -> None:
        self.module, self.optim, self.names, self.aux_weight = module, optim, names, aux_weight
        self.dtype = _DTYPES["float64" if dtype == "float64" else "float32"]
        self.autocast = dtype == "bfloat16"
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def _copy(self, train: bool) -> nn.Module:
        module = copy.deepcopy(self.module).to(self.dtype).train(train)
        # torch's stubs do not know the argument.
        module.to(memory_format=self.format)  # type: ignore[call-overload]
        for layer in module.modules():
            if isinstance(layer, nn.Dropout | nn.Dropout2d):
                layer.p = 0.0
        return module

    def _name(self, own: str) -> str:
        return self.names.get(own, own)

    def _leaf(self, own: str) -> str:
        layer, _, leaf = own.rpartition(".")
        return f"{self._name(layer)}.{leaf}"

    def _forward(self, module: nn.Module, images: np.ndarray) -> tuple[Tensor, ...]:
        x = torch.from_numpy(np.array(images)).to(self.dtype).permute(0, 3, 1, 2).contiguous(memory_format=self.format)
        low = torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()
        try:
            with low:
                out = module(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                "torch normalises no single value; give a larger image or more images, so that pool5 has two pixels"
            ) from error
        return out if isinstance(out, tuple) else (out,)

    def layers(self, images: np.ndarray, train: bool) -> Arrays:
        """Run the forward pass with a hook on every layer."""
        module = self._copy(train)
        found: dict[str, np.ndarray] = {}
        for own, layer in module.named_modules():
            if isinstance(layer, _LAYERS):
                name = self._name(own)
                # A copy: an in-place ReLU would change the output afterwards.
                layer.register_forward_hook(
                    lambda _layer, _in, out, name=name: found.update({name: _numpy(out.permute(0, 2, 3, 1))})
                )
        with torch.no_grad():
            logits = self._forward(module, images)[0]
        found["logits"] = _numpy(logits.permute(0, 2, 3, 1))
        return found

    def _backward(self, module: nn.Module, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        target = torch.from_numpy(np.array(labels, np.int64))
        outs = self._forward(module, images)
        factors = (1.0, self.aux_weight)
        losses = [
            f * F.cross_entropy(o.to(self.dtype), target, ignore_index=IGNORE)
            for o, f in zip(outs, factors, strict=False)
        ]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss.detach().numpy()

    def gradient(self, images: np.ndarray, labels: np.ndarray) -> Gradient:
        """Run forward and backward in training mode."""
        module = self._copy(True)
        loss = self._backward(module, images, labels)
        gradients = {
            self._leaf(own): (torch.zeros_like(p) if p.grad is None else p.grad).detach().numpy()
            for own, p in module.named_parameters()
        }
        statistics = {self._leaf(own): b.numpy() for own, b in module.named_buffers() if "running_" in own}
        return Gradient(loss, gradients, statistics)

    def train(self, images: np.ndarray, labels: np.ndarray, steps: int) -> Iterator[TrainedStep]:
        """Train on one batch with ``torch.optim.SGD``."""
        module, optim = self._copy(True), self.optim
        sgd = torch.optim.SGD(
            module.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            nesterov=optim.nesterov,
        )
        for _ in range(steps):
            loss = self._backward(module, images, labels)
            sgd.step()
            sgd.zero_grad()  # frees the gradients, which nobody reads while the other side steps
            yield TrainedStep(
                float(loss), {self._leaf(own): p.detach().numpy() for own, p in module.named_parameters()}
            )
