"""Comparison sides and benchmark runners for networks of the catalogue, with the training step of train.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from fcn_jax import weights
from fcn_jax.compare.bench import Numbers, Runner
from fcn_jax.compare.parity import Arrays, Gradient, Side, TrainedStep
from fcn_jax.config import OptimConfig
from fcn_jax.devices import AXIS, Parallel, make_mesh, make_parallel, pick_devices
from fcn_jax.errors import InputError
from fcn_jax.losses import make_loss
from fcn_jax.models import summarize
from fcn_jax.models.fcn import FCN
from fcn_jax.models.kernels import cpu_kernels
from fcn_jax.models.layers import BatchNorm
from fcn_jax.models.upsample import TransposedConv
from fcn_jax.optim import make_optimizer
from fcn_jax.step import AxisName, make_train_step, new_state


def without_dropout(model: FCN) -> FCN:
    """Return the network with dropout off, in training too."""
    return model.clone(dropout_rate=0.0) if hasattr(model, "dropout_rate") else model


def dilated_upsampling(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Compute transposed convolutions as ``jax.lax.conv_transpose`` does, as a convolution of the dilated input.

    A Flax interceptor: out[o] = sum over j of dilated[o + j - (k - 1 - padding)] kernel[k - 1 - j], which is the sum of
    ``models.upsample.transposed_conv`` with the zero terms included.
    """
    layer = context.module
    if not isinstance(layer, TransposedConv) or context.method_name != "__call__":
        return next_call(*args, **kwargs)
    compute, parameters = layer.compute, layer.variables["params"]
    x, kernel = args[0].astype(compute.dtype), parameters["kernel"].astype(compute.dtype)[::-1, ::-1]
    margin, strides = layer.kernel_size - 1 - layer.padding, (layer.stride, layer.stride)
    pads = ((margin, margin + layer.output_padding),) * 2
    y = jax.lax.conv_transpose(x, kernel, strides, pads, precision=compute.precision)
    return y + parameters["bias"].astype(compute.dtype) if layer.use_bias else y


def _apply(model: FCN, axis_name: AxisName | None, interceptor: Any) -> Callable[..., Any]:
    """Return a model's ``apply``, with its layers intercepted if there is an interceptor."""
    apply = model.clone(axis_name=axis_name).apply
    if interceptor is None:
        return apply

    def intercepted(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(interceptor):
            return apply(*args, **kwargs)

    return intercepted


def step_on_devices(model: FCN, optimizer: Any, mode: str, devices: Any, interceptor: Any = None) -> Parallel:
    """Make the training step of train.py (mean softmax cross-entropy) on some devices; mode is "pmap" or "mesh"."""

    def make_step(axis_name: Any, **options: Any) -> Any:
        options |= {"axis_name": axis_name, "pass_example_ids": True}
        step = make_train_step(_apply(model, axis_name, interceptor), optimizer, make_loss("softmax"), **options)
        return cpu_kernels(devices[0].platform == "cpu")(step)

    return make_parallel(mode, make_step, make_mesh(devices))


def make_jax_side(
    model: FCN,
    variables: Mapping[str, Any],
    optim: OptimConfig | None = None,
    *,
    name: str = "jax",
    mode: str = "mesh",
    devices: int = 1,
    interceptor: Callable[..., Any] | None = None,
) -> Side:
    """Make the side of a network, with torch's names and axes as in ``weights.to_torch``.

    Args:
        model: a network of the catalogue; its dropout is turned off.
        variables: its weights; they are not changed.
        optim: settings of SGD; by default ``OptimConfig()``.
        name: the side's name in reports.
        mode: "pmap" or "mesh", as in ``devices``; on one device "mesh" is plain jit.
        devices: number of devices that the batch is split over.
        interceptor: replaces calls of layers; see ``flax.linen.intercept_methods``.

    Raises:
        InputError: unknown mode, too few devices, or float64 requested where JAX has it turned off.
    """
    if jnp.dtype(model.param_dtype) == np.float64 and not jax.config.read("jax_enable_x64"):
        raise InputError("float64 is turned off in JAX; call jax.config.update('jax_enable_x64', True) at the start")
    model, chosen = without_dropout(model), pick_devices(devices)
    sgd = make_optimizer(variables["params"], optim or OptimConfig(), 1, model.freeze_stages)
    # Stores the gradient in the state, for ``gradient``, and passes it on unchanged.
    recorder = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (grads, grads)
    )
    optimizer = optax.chain(recorder, sgd)
    parallel = step_on_devices(model, optimizer, mode, chosen, interceptor)

    def wanted(module: nn.Module, method: str) -> bool:
        return isinstance(module, nn.Conv | TransposedConv | BatchNorm) and method == "__call__"

    @functools.cache
    def forward(train: bool) -> Any:
        apply = _apply(model, AXIS if mode == "pmap" else None, interceptor)
        collections = ["intermediates", "batch_stats"]
        function = functools.partial(apply, train=train, capture_intermediates=wanted, mutable=collections)
        function = cpu_kernels(chosen[0].platform == "cpu")(function)
        if mode == "mesh":
            return jax.jit(function)
        return jax.pmap(function, axis_name=AXIS, in_axes=(None, 0), devices=list(chosen))

    def layers(images: np.ndarray, train: bool) -> Arrays:
        """Run the forward pass; return the outputs of convolutions and batch norms in order, and the logits."""
        x = parallel.place_batch({"image": np.asarray(images, model.param_dtype)})["image"]
        out, captured = jax.device_get(forward(train)(dict(variables), x))
        outputs = flatten_dict(captured["intermediates"], sep=".")
        order = [row.path.replace("/", ".") for row in summarize(model, images.shape[1:3])]
        found = {layer: outputs[f"{layer}.__call__"][0] for layer in order if f"{layer}.__call__" in outputs}
        found["logits"] = out[0] if isinstance(out, tuple) else out
        return {layer: y.reshape(-1, *y.shape[2:]) for layer, y in found.items()} if mode == "pmap" else found

    def steps(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[Any, Any]]:
        """Yield state and sums after each step on one batch, endlessly."""
        batch = parallel.place_batch({"image": np.asarray(images, model.param_dtype), "label": np.int32(labels)})
        # The step donates its state; the copy preserves the caller's weights.
        state = parallel.place_state(new_state(jax.tree.map(jnp.copy, variables), optimizer))
        while True:
            state, sums = parallel.step(state, batch)
            yield state, sums

    def gradient(images: np.ndarray, labels: np.ndarray) -> Gradient:
        state, sums = next(steps(images, labels))
        gradients = weights.to_torch(model, {"params": state.opt_state[0]})
        return Gradient(np.asarray(sums.loss), gradients, _running_statistics(model, state))

    def train(images: np.ndarray, labels: np.ndarray, count: int) -> Iterator[TrainedStep]:
        for state, sums in itertools.islice(steps(images, labels), count):
            yield TrainedStep(float(sums.loss), weights.to_torch(model, {"params": state.params}))

    return Side(name, layers, gradient, train)


def _running_statistics(model: FCN, state: Any) -> Arrays:
    arrays = weights.to_torch(model, {"batch_stats": jax.device_get(state.batch_stats)})
    return {name: value for name, value in arrays.items() if "running_" in name}


def _planned_bytes(jitted: Any, *arguments: Any) -> int | None:
    """Compile; return the bytes of arguments, outputs and temporaries. Donated arrays count once."""
    plan = jitted.lower(*arguments).compile().memory_analysis()
    if plan is None:
        return None
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return total - plan.alias_size_in_bytes


def function_runner(function: Callable[..., Any], arguments: Any, numbers: Callable[[Any], Numbers]) -> Runner:
    """Make the runner of a function of arrays, jitted here; the arguments are placed on the first device."""
    jitted = jax.jit(cpu_kernels(jax.default_backend() == "cpu")(function))
    placed = jax.device_put(arguments, jax.devices()[0])
    planned = functools.partial(_planned_bytes, jitted, *placed)
    return Runner(lambda: jitted(*placed), jax.block_until_ready, numbers, planned)


def train_runner(model: FCN, variables: Any, batch: tuple[Any, Any], optim: OptimConfig) -> Runner:
    """Make the runner of the training step, under pmap on the first device."""
    optimizer = make_optimizer(variables["params"], optim, 1)
    parallel = step_on_devices(model, optimizer, "pmap", jax.devices()[:1])
    state = parallel.place_state(new_state(jax.tree.map(jnp.array, variables), optimizer))
    placed = parallel.place_batch({"image": batch[0], "label": batch[1].astype(np.int32)})

    def call() -> Any:
        nonlocal state
        state, sums = parallel.step(state, placed)
        return sums.loss

    def numbers(loss: Any) -> Numbers:
        after = weights.to_torch(model, {"params": jax.device_get(state.params)})
        before = weights.to_torch(model, {"params": variables["params"]})
        update = {name: value - before[name] for name, value in after.items()}
        running = _running_statistics(model, state)
        found: Numbers = {"loss": {"": np.asarray(loss, np.float32)}, "update": update}
        return {**found, "statistics": running} if running else found

    def planned() -> int | None:
        return _planned_bytes(parallel.step, state, placed)

    return Runner(call, lambda _: jax.block_until_ready(state), numbers, planned)
