"""Comparison sides and benchmark runners for PyTorch modules. Imported only where torch is needed."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from fcn_jax import weights
from fcn_jax.compare.bench import Numbers, Runner, Settings, cores_allowed
from fcn_jax.compare.parity import Arrays, Gradient, Side, TrainedStep
from fcn_jax.compare.twins import make_twin
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError, unknown
from fcn_jax.losses import IGNORE
from fcn_jax.models.fcn import FCN

Function = Callable[..., Any]
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
"""Parameter dtype, by compute dtype."""


@dataclass(frozen=True)
class Way:
    """The settings of a PyTorch computation."""

    dtype: str = "float32"
    """"float64", "float32", or "bfloat16" (autocast over float32 parameters)."""
    format: torch.memory_format = torch.contiguous_format
    """Memory format of images and kernels."""
    device: str = "cpu"
    backend: str | None = None
    """Backend of ``torch.compile``; None for eager mode."""

    def tensor(self, x: Any) -> Tensor:
        """Copy an array, in torch's axes, to the device."""
        low = x.dtype.name == "bfloat16"  # torch does not know this NumPy dtype
        tensor = torch.from_numpy(np.array(x, np.float32 if low else None)).to(self.device)
        tensor = tensor.to(torch.bfloat16) if low else tensor
        return tensor.contiguous(memory_format=self.format) if tensor.ndim == 4 else tensor

    def images(self, images: np.ndarray) -> Tensor:
        """Copy images (b, h, w, 3) to the device."""
        return self.tensor(images.transpose(0, 3, 1, 2).astype("float64" if self.dtype == "float64" else "float32"))

    def place(self, module: nn.Module, train: bool) -> nn.Module:
        """Copy a module to the device, with dropout off."""
        module = copy.deepcopy(module).to(self.device, _DTYPES[self.dtype]).train(train)
        module.to(memory_format=self.format)  # type: ignore[call-overload]  # torch's stubs do not know the argument
        for layer in module.modules():
            if isinstance(layer, nn.Dropout | nn.Dropout2d):
                layer.p = 0.0
        return module

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context of a forward pass."""
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "bfloat16" else contextlib.nullcontext()

    def wait(self, _: Any) -> None:
        """Wait until the device has finished."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def compiled(self, function: Function) -> Function:
        """Compile a function if a backend is set."""
        return function if self.backend is None else torch.compile(function, backend=self.backend)

    def loss(self, module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """Return the mean softmax cross-entropy, plus 0.4 times that of auxiliary logits, as in Tramac."""
        with self.autocast():
            out = module(x)
        main, *aux = out if isinstance(out, tuple) else (out,)
        loss = F.cross_entropy(main.to(_DTYPES[self.dtype]), target, ignore_index=IGNORE)
        for logits in aux:
            loss = loss + 0.4 * F.cross_entropy(logits.to(_DTYPES[self.dtype]), target, ignore_index=IGNORE)
        return loss


def _sgd(module: nn.Module, optim: OptimConfig, fused: bool | None = None) -> torch.optim.SGD:
    options: dict[str, Any] = {"momentum": optim.momentum, "weight_decay": optim.weight_decay}
    return torch.optim.SGD(module.parameters(), lr=optim.lr, nesterov=optim.nesterov, fused=fused, **options)


def _step(loss: Tensor, sgd: torch.optim.SGD) -> Tensor:
    loss.backward()
    sgd.step()
    sgd.zero_grad()  # frees the gradients, so that their memory is reused until the next backward pass
    return loss.detach()


def _numpy(x: Tensor) -> np.ndarray:
    """Copy a tensor to NumPy; on the CPU ``Tensor.numpy`` returns a view, which changes with the parameters."""
    x = x.detach().cpu()
    return x.float().numpy().astype(jnp.bfloat16) if x.dtype == torch.bfloat16 else np.array(x.numpy())


def load_twin(model: FCN, variables: Mapping[str, Any]) -> nn.Module:
    """Build the PyTorch network of a model of the catalogue, with the same weights."""
    twin = make_twin(model)
    arrays = weights.to_torch(model, variables)
    twin.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    return twin


def make_torch_side(
    module: nn.Module,
    optim: OptimConfig | None = None,
    *,
    name: str = "torch",
    dtype: str = "float32",
    channels_last: bool = False,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Side:
    """Make the side of a module: images (b, 3, h, w) -> logits (b, num_classes, h, w), or (logits, auxiliary logits).

    The module is not changed; copies of it run on the CPU with dropout off. An unknown dtype raises an InputError.

    Args:
        module: any segmentation network; convolutions, transposed convolutions and batch norms are its layers.
        optim: settings of SGD, with one fixed rate for all parameters; by default ``OptimConfig()``.
        name: the side's name in reports.
        dtype: "float64", "float32", or "bfloat16" (autocast over float32 parameters).
        channels_last: use this memory format for images and kernels.
        names: own name of a submodule -> the other side's; submodules not listed keep their own.
    """
    if dtype not in _DTYPES:
        raise unknown("dtype", dtype, _DTYPES)
    way = Way(dtype, torch.channels_last if channels_last else torch.contiguous_format)

    def renamed(own: str) -> str:
        layer, _, leaf = own.rpartition(".")
        return f"{names.get(layer, layer)}.{leaf}"

    def layers(images: np.ndarray, train: bool) -> Arrays:
        copied, found = way.place(module, train), {}

        def keep(own: str, _layer: Any, _inputs: Any, out: Tensor) -> None:
            found[names.get(own, own)] = _numpy(out)  # a copy: an in-place ReLU would change the output afterwards

        for own, layer in copied.named_modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm2d):
                layer.register_forward_hook(functools.partial(keep, own))
        with torch.no_grad(), way.autocast():
            out = copied(way.images(images))
        found["logits"] = _numpy(out[0] if isinstance(out, tuple) else out)
        return {layer: y.transpose(0, 2, 3, 1) for layer, y in found.items()}

    def gradient(images: np.ndarray, labels: np.ndarray) -> Gradient:
        copied = way.place(module, True)
        loss = way.loss(copied, way.images(images), way.tensor(np.int64(labels)))
        loss.backward()
        gradients = {
            renamed(own): (torch.zeros_like(p) if p.grad is None else p.grad).detach().numpy()
            for own, p in copied.named_parameters()
        }
        statistics = {renamed(own): b.numpy() for own, b in copied.named_buffers() if "running_" in own}
        return Gradient(loss.detach().numpy(), gradients, statistics)

    def train(images: np.ndarray, labels: np.ndarray, steps: int) -> Iterator[TrainedStep]:
        copied, x, target = way.place(module, True), way.images(images), way.tensor(np.int64(labels))
        sgd = _sgd(copied, optim or OptimConfig())
        for _ in range(steps):
            loss = _step(way.loss(copied, x, target), sgd)
            parameters = {renamed(own): p.detach().numpy() for own, p in copied.named_parameters()}
            yield TrainedStep(float(loss), parameters)

    return Side(name, layers, gradient, train)


# --- benchmark


def prepare(settings: Settings) -> None:
    """Use all cores, and on a GPU cuDNN's autotuner; InputError if torch sees no GPU."""
    torch.set_num_threads(cores_allowed() or torch.get_num_threads())
    if settings.on_gpu:
        if not torch.cuda.is_available():
            raise InputError("torch sees no GPU here; install torch for CUDA, or give --against none")
        torch.backends.cudnn.benchmark = True


def describe(record: dict[str, Any]) -> None:
    """Add hardware and versions as torch sees them to the record of ``bench.describe``."""
    record["hardware"]["torch_threads"], record["versions"]["torch"] = torch.get_num_threads(), str(torch.__version__)
    if torch.cuda.is_available():
        memory, cudnn = torch.cuda.get_device_properties(0).total_memory, str(torch.backends.cudnn.version())
        record["hardware"] |= {"gpu": torch.cuda.get_device_name(), "gpu_memory_bytes": memory}
        record["versions"] |= {"torch_cuda": torch.version.cuda, "cudnn": cudnn}


def meter() -> Callable[[], int | None]:
    """Start to measure memory; see ``bench.meter``."""
    if not torch.cuda.is_available():
        return lambda: None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Zero means that the CPU computes although there is a GPU.
    return lambda: torch.cuda.max_memory_allocated() - before or None


def release() -> None:
    """Discard compiled functions (torch limits recompilations of the same code) and free cached memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_way(settings: Settings, variant: str) -> Way:
    """Choose device, memory format and compiler; a smoke run omits code generation, which takes a minute."""
    device, backend = ("cuda", "inductor") if settings.on_gpu else ("cpu", "aot_eager")
    layout = torch.channels_last if "channels_last" in variant else torch.contiguous_format
    return Way(settings.dtype, layout, device, backend if "compiled" in variant else None)


# A transposed convolution has k = 2 stride here. Gradients are computed outside the compiled function, as in torch.
_WITH_GRADIENTS: dict[str, Function] = {
    "upsample": lambda x, w: F.conv_transpose2d(x, w, stride=w.shape[2] // 2, padding=w.shape[2] // 4),
    "pool": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
}
_ALONE: dict[str, Function] = {
    "matmul": lambda a, b: (a @ b,),
    "forward": lambda x, w, g: (F.conv2d(x, w, padding=1),),
    "dx": lambda x, w, g: (conv2d_input(x.shape, w, g, padding=1),),
    "dw": lambda x, w, g: (conv2d_weight(x, w.shape, g, padding=1),),
}


def operator_runner(operator: str, arguments: Sequence[np.ndarray], names: Sequence[str], way: Way) -> Runner:
    """Make the runner of one operator; ``names`` are of its output, then of the gradient of each argument.

    Operators are "matmul"; "forward", "dx" and "dw" (one part of a 3x3 convolution alone); "upsample" and "pool" (2x2)
    with their gradients, whose last argument is the cotangent. Arguments are in torch's axes.
    """
    tensors = tuple(way.tensor(x) for x in arguments)
    function = way.compiled((_ALONE | _WITH_GRADIENTS)[operator])

    def with_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        *inputs, cotangent = tensors
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

    run = with_gradients if operator in _WITH_GRADIENTS else function

    def numbers(out: Any) -> Numbers:
        return {name: {"": _numpy(y).astype(np.float32)} for name, y in zip(names, out, strict=True)}

    return Runner(lambda: run(*tensors), way.wait, numbers)


def forward_runner(model: FCN, variables: Any, images: np.ndarray, way: Way, encoder: bool) -> Runner:
    """Make the runner of a network's forward pass in eval mode, or of its encoder alone."""
    network: Any = way.place(load_twin(model, variables), False)
    compiled = way.compiled((lambda x: network.vgg(x)[-1]) if encoder else network)
    x = way.images(images)

    def call() -> Tensor:
        with torch.inference_mode(), way.autocast():
            return compiled(x)

    def numbers(out: Tensor) -> Numbers:
        return {"pool5" if encoder else "logits": {"": _numpy(out.permute(0, 2, 3, 1)).astype(np.float32)}}

    return Runner(call, way.wait, numbers)


def train_runner(model: FCN, variables: Any, batch: tuple[Any, Any], optim: OptimConfig, way: Way) -> Runner:
    """Make the runner of a training step: forward, mean softmax cross-entropy, backward, ``torch.optim.SGD``."""
    network = way.place(load_twin(model, variables), True)
    before = {name: _numpy(p) for name, p in network.named_parameters()}
    x, target, sgd = way.images(batch[0]), way.tensor(np.int64(batch[1])), _sgd(network, optim, fused=True)
    loss = way.compiled(lambda x, target: way.loss(network, x, target))

    def numbers(out: Tensor) -> Numbers:
        update = {name: _numpy(p) - before.pop(name) for name, p in network.named_parameters()}
        running = {name: _numpy(b) for name, b in network.named_buffers() if "running_" in name}
        return {"loss": {"": _numpy(out)}, "update": update, **({"statistics": running} if running else {})}

    return Runner(lambda: _step(loss(x, target), sgd), way.wait, numbers)
