"""A network of the catalogue as one side of a comparison: the training step itself, on one device or on several."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fcn_jax import weights
from fcn_jax.compare.sides import Arrays, Gradient, Side, TrainedStep
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError, unknown
from fcn_jax.losses import make_loss
from fcn_jax.models.fcn import FCN
from fcn_jax.models.layers import BatchNorm
from fcn_jax.models.upsample import TransposedConv
from fcn_jax.optim import make_optimizer
from fcn_jax.step import TrainStep, make_train_step, new_state
from fcn_jax.training.devices import AXIS, PARALLEL, make_mesh, make_parallel, pick_devices

__all__ = ["Interceptor", "dilated_upsampling", "make_jax_side", "without_dropout"]

Interceptor = Callable[..., Any]
"""Of ``flax.linen.intercept_methods``."""
_LAYERS = (nn.Conv, TransposedConv, BatchNorm)


def without_dropout(model: FCN) -> FCN:
    """Return the network with dropout off, in training too."""
    return model.clone(dropout_rate=0.0) if hasattr(model, "dropout_rate") else model


def dilated_upsampling(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Compute transposed convolutions as ``jax.lax.conv_transpose`` does, as a convolution of the dilated input.

    An interceptor: out[o] = sum over j of dilated[o + j - (k - 1 - padding)] kernel[k - 1 - j], the sum of
    ``models.upsample.transposed_conv`` with its zeros.
    """
    layer = context.module
    if not isinstance(layer, TransposedConv) or context.method_name != "__call__" or layer.is_initializing():
        return next_call(*args, **kwargs)
    compute, parameters = layer.compute, layer.variables["params"]
    margin = layer.kernel_size - 1 - layer.padding
    y = jax.lax.conv_general_dilated(
        args[0].astype(compute.dtype),
        jnp.flip(parameters["kernel"].astype(compute.dtype), (0, 1)),
        window_strides=(1, 1),
        padding=((margin, margin + layer.output_padding),) * 2,
        lhs_dilation=(layer.stride, layer.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=compute.precision,
    )
    return y + parameters["bias"].astype(compute.dtype) if layer.use_bias else y


def make_jax_side(
    model: FCN,
    variables: Mapping[str, Any],
    optim: OptimConfig | None = None,
    *,
    name: str = "jax",
    mode: str = "jit",
    devices: int = 1,
    interceptor: Interceptor | None = None,
) -> Side:
    """Make the side of a network: names and axes are torch's, those of ``weights.to_torch``.

    Losses, gradients and steps are those of ``training.step.make_train_step``; dropout is off.

    Args:
        model: a network of the catalogue.
        variables: its weights; they are not changed.
        optim: of the training; by default ``OptimConfig()``.
        name: what reports call this side.
        mode: "jit" (one device), or "pmap" or "mesh" of ``training.parallel``.
        devices: over how many devices the batch is spread.
        interceptor: replaces calls of layers, see ``flax.linen.intercept_methods``.

    Raises:
        InputError: unknown mode, too few devices, or float64 asked for where JAX has it turned off.
    """
    if mode not in ("jit", *PARALLEL):
        raise unknown("mode", mode, ("jit", *PARALLEL))
    if jnp.dtype(model.param_dtype) == np.float64 and not jax.config.read("jax_enable_x64"):
        raise InputError("float64 is turned off in JAX; jax.config.update('jax_enable_x64', True) at the start")
    run = _Run(without_dropout(model), variables, optim or OptimConfig(), mode, pick_devices(devices), interceptor)
    return Side(name, run.layers, run.gradient, run.train)


class _Run:
    """What the callables of one side share."""

    def __init__(
        self, model: FCN, variables: Mapping[str, Any], optim: OptimConfig, mode: str, devices: Any, interceptor: Any
    ) -> None:
        self.model, self.variables, self.optim = model, variables, optim
        self.mode, self.devices, self.interceptor = mode, devices, interceptor

    def _intercepted(self) -> contextlib.AbstractContextManager[Any]:
        return nn.intercept_methods(self.interceptor) if self.interceptor else contextlib.nullcontext()

    @functools.cache  # noqa: B019  (a compiled function lives as long as its side)
    def _forward(self, train: bool) -> tuple[Any, list[str]]:
        """Return the compiled forward pass, and the list that its first call fills with the layers' names in order."""
        order: list[str] = []
        model = self.model.clone(axis_name=AXIS if self.mode == "pmap" else None)

        def wanted(module: nn.Module, method: str) -> bool:
            return isinstance(module, _LAYERS) and method == "__call__"

        def note(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            # Names alone are noted here, so that nothing leaks out of a rematerialised stage.
            if wanted(context.module, context.method_name):
                order.append(".".join(context.module.path))
            return next_call(*args, **kwargs)

        def forward(variables: Any, images: jax.Array) -> Any:
            with nn.intercept_methods(note), self._intercepted():
                return model.apply(
                    variables,
                    images,
                    train=train,
                    capture_intermediates=wanted,
                    mutable=["intermediates", "batch_stats"],
                )

        if self.mode == "pmap":
            return jax.pmap(forward, axis_name=AXIS, in_axes=(None, 0), devices=list(self.devices)), order
        return jax.jit(forward), order

    def layers(self, images: np.ndarray, train: bool) -> Arrays:
        """Run the forward pass; return the outputs of convolutions and batch norms in order, and the logits."""
        forward, order = self._forward(train)
        x: Any = np.asarray(images, self.model.param_dtype)
        if self.mode == "pmap":
            x = x.reshape(len(self.devices), -1, *x.shape[1:])
        elif self.mode == "mesh":
            x = jax.device_put(x, NamedSharding(make_mesh(self.devices), PartitionSpec(AXIS)))
        out, captured = jax.device_get(forward(dict(self.variables), x))
        found = {}
        for layer in dict.fromkeys(order):
            node = captured["intermediates"]
            for part in layer.split("."):
                node = node[part]
            found[layer] = node["__call__"][0]
        found["logits"] = out[0] if isinstance(out, tuple) else out
        if self.mode == "pmap":
            return {name: y.reshape(-1, *y.shape[2:]) for name, y in found.items()}
        return found

    @functools.cache  # noqa: B019
    def _step(self) -> tuple[Any, Any, Any]:
        """Return the compiled step, the optimiser, and how to place state and batch."""
        sgd = make_optimizer(self.variables["params"], self.optim, 1, self.model.freeze_encoder)
        optimizer = optax.chain(_recorder(), sgd)

        def make_step(axis_name: str | None) -> TrainStep:
            step = make_train_step(self.model, optimizer, make_loss("softmax"), None, axis_name=axis_name)

            def intercepted(state: Any, batch: Any) -> Any:
                with self._intercepted():
                    return step(state, batch)

            return intercepted

        if self.mode == "jit":
            # The step does not read the gradient of the one before; kept as an argument, its memory takes the new one.
            step = jax.jit(make_step(None), donate_argnums=(0,), keep_unused=True)
            return step, optimizer, (lambda state: state, dict)
        parallel = make_parallel(self.mode, make_step, self.devices)
        return parallel.step, optimizer, (parallel.place_state, parallel.place_batch)

    def _states(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Any, Any]]:
        """Yield state and sums after each step on one batch, without end."""
        step, optimizer, (place_state, place_batch) = self._step()
        batch = place_batch({"image": np.asarray(images, self.model.param_dtype), "label": np.int32(labels)})
        # The step consumes its state, the caller's weights stay.
        state = place_state(new_state(jax.tree.map(jnp.copy, self.variables), optimizer, seed=0))
        while True:
            state, sums = step(state, batch)
            yield state, sums

    def gradient(self, images: np.ndarray, labels: np.ndarray) -> Gradient:
        """Take one training step; its optimiser remembers the gradient."""
        state, sums = next(self._states(images, labels))
        gradients = weights.to_torch(self.model, {"params": state.opt_state[0]})
        statistics = weights.to_torch(self.model, {"batch_stats": state.batch_stats})
        running = {name: value for name, value in statistics.items() if "running" in name}
        return Gradient(np.asarray(sums.loss), gradients, running)

    def train(self, images: np.ndarray, labels: np.ndarray, steps: int) -> Iterator[TrainedStep]:
        """Train on one batch."""
        for state, sums in itertools.islice(self._states(images, labels), steps):
            yield TrainedStep(float(sums.loss), weights.to_torch(self.model, {"params": state.params}))


def _recorder() -> optax.GradientTransformation:
    """Pass the gradient on and keep it in the state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )
