"""The other side: the same work in PyTorch, as fast as PyTorch does it. Imported only where torch is wanted."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from fcn_jax import weights
from fcn_jax.compare.machine import cores_allowed
from fcn_jax.compare.rows import Numbers, Runner
from fcn_jax.compare.settings import Settings
from fcn_jax.compare.twins import make_twin
from fcn_jax.config import OptimConfig
from fcn_jax.errors import InputError
from fcn_jax.losses import IGNORE
from fcn_jax.models.fcn import FCN

__all__ = [
    "conv_part",
    "describe",
    "encoder",
    "inference",
    "matmul",
    "meter",
    "operator",
    "pool",
    "prepare",
    "release",
    "train_step",
    "upsample",
]

Function = Callable[..., Any]
Make = Callable[[Callable[[Function], Function]], Function]
"""Makes an operator, given how to compile; a gradient is asked for outside of what is compiled, as torch has it."""


def prepare(settings: Settings) -> None:
    """Set torch up for speed: all cores; on a GPU the convolution algorithms that are fastest when tried.

    Raises:
        InputError: torch sees no GPU where one is to be measured.
    """
    torch.set_num_threads(cores_allowed() or torch.get_num_threads())
    if settings.on_gpu:
        if not torch.cuda.is_available():
            raise InputError("torch sees no GPU here; install torch for CUDA, or give --against none")
        torch.backends.cudnn.benchmark = True


def describe() -> dict[str, Any]:
    """Return hardware and versions as torch sees them."""
    versions: dict[str, str | None] = {"torch": str(torch.__version__)}
    hardware: dict[str, Any] = {"torch_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        versions |= {"torch_cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        hardware["gpu"] = torch.cuda.get_device_name()
        hardware["gpu_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return {"hardware": hardware, "versions": versions}


def meter() -> Callable[[], int | None]:
    """Start counting, see ``machine.meter``."""
    if not torch.cuda.is_available():
        return lambda: None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # Nothing at all: the CPU computes, though there is a GPU.
    return lambda: torch.cuda.max_memory_allocated() - before or None


def release() -> None:
    """Forget compiled functions (torch gives up compiling after a few of one origin) and return cached memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _device(settings: Settings) -> str:
    return "cuda" if settings.on_gpu else "cpu"


def _format(variant: str) -> torch.memory_format:
    return torch.channels_last if "channels_last" in variant else torch.contiguous_format


def _compiled(function: Function, settings: Settings, variant: str) -> Function:
    """Compile where the variant says so; a smoke run leaves the code generator out, which takes a minute."""
    if "compiled" not in variant:
        return function
    return torch.compile(function, backend="inductor" if settings.on_gpu else "aot_eager")


def _wait(settings: Settings) -> Callable[[Any], object]:
    return (lambda _: torch.cuda.synchronize()) if settings.on_gpu else (lambda _: None)


def _autocast(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    if settings.kind == "cpu":
        return contextlib.nullcontext()
    return torch.autocast(_device(settings), torch.bfloat16)


def _tensor(x: np.ndarray, settings: Settings, variant: str) -> Tensor:
    """Place an array whose axes are torch's already."""
    # torch knows nothing of NumPy's bfloat16.
    low = x.dtype.name == "bfloat16"
    tensor = torch.from_numpy(np.array(x, np.float32 if low else None)).to(_device(settings))
    tensor = tensor.to(torch.bfloat16) if low else tensor
    return tensor.contiguous(memory_format=_format(variant)) if tensor.ndim == 4 else tensor


def _array(x: Tensor) -> np.ndarray:
    """Copy a tensor: on the CPU ``numpy`` gives a view, which would follow the parameters that it was taken of."""
    return np.array(x.detach().float().cpu().numpy())


def operator(
    make: Make,
    arguments: tuple[np.ndarray, ...],
    names: tuple[str, ...],
    settings: Settings,
    variant: str,
) -> Runner:
    """Make the runner of a function of tensors.

    Args:
        make: makes the function, which takes the tensors and returns as many as there are names.
        arguments: in torch's axes.
        names: of the results.
        settings: device and dtype.
        variant: memory format, and whether it is compiled.
    """
    tensors = tuple(_tensor(x, settings, variant) for x in arguments)
    function = make(lambda part: _compiled(part, settings, variant))

    def numbers(out: Any) -> Numbers:
        return {name: {"": _array(y)} for name, y in zip(names, out, strict=True)}

    return Runner(lambda: function(*tensors), _wait(settings), numbers)


def matmul(compiled: Callable[[Function], Function]) -> Function:
    """Make a matrix product: (a, b) -> (out,)."""
    return compiled(lambda a, b: (a @ b,))


def _with_gradients(forward: Function) -> Function:
    """Make (*arguments, cotangent) -> (out, the gradient of each argument)."""

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        *arguments, cotangent = tensors
        leaves = [x.detach().requires_grad_() for x in arguments]
        out = forward(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

    return run


def upsample(stride: int) -> Make:
    """Make a transposed convolution of k = 2 stride: (x, kernel, cotangent) -> (out, dx, dw)."""

    def forward(x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv_transpose2d(x, kernel, stride=stride, padding=stride // 2)

    return lambda compiled: _with_gradients(compiled(forward))


def pool(compiled: Callable[[Function], Function]) -> Function:
    """Make a 2x2 max pooling: (x, cotangent) -> (out, dx)."""
    return _with_gradients(compiled(lambda x: F.max_pool2d(x, 2, ceil_mode=True)))


def conv_part(part: str) -> Make:
    """Make one part of a 3x3 convolution, without the others: (x, kernel, cotangent) -> (result,)."""
    parts: dict[str, Function] = {
        "forward": lambda x, w, g: (F.conv2d(x, w, padding=1),),
        "dx": lambda x, w, g: (conv2d_input(x.shape, w, g, padding=1),),
        "dw": lambda x, w, g: (conv2d_weight(x, w.shape, g, padding=1),),
    }
    return lambda compiled: compiled(parts[part])


def _twin(model: FCN, variables: Mapping[str, Any], settings: Settings, variant: str) -> nn.Module:
    twin = make_twin(model)
    arrays = weights.to_torch(model, variables)
    twin.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    # torch's stubs do not know the second argument.
    return twin.to(_device(settings)).to(memory_format=_format(variant))  # type: ignore[call-overload]


def _images(images: np.ndarray, settings: Settings, variant: str) -> Tensor:
    return _tensor(np.moveaxis(images, 3, 1), settings, variant)


def encoder(model: FCN, variables: Any, images: np.ndarray, settings: Settings, variant: str) -> Runner:
    """Make the runner of the encoder alone, see ``inference``."""
    twin = _twin(model, variables, settings, variant).eval()
    return _forward(lambda x: twin.vgg(x)[-1], "pool5", images, settings, variant)  # type: ignore[operator]


def inference(model: FCN, variables: Any, images: np.ndarray, settings: Settings, variant: str) -> Runner:
    """Make the runner of a network's forward pass: images (b, h, w, 3) as given to ours."""
    return _forward(_twin(model, variables, settings, variant).eval(), "logits", images, settings, variant)


def _forward(function: Function, name: str, images: np.ndarray, settings: Settings, variant: str) -> Runner:
    x, compiled = _images(images, settings, variant), _compiled(function, settings, variant)

    def call() -> Tensor:
        with torch.inference_mode(), _autocast(settings):
            return compiled(x)

    return Runner(call, _wait(settings), lambda out: {name: {"": _array(out.permute(0, 2, 3, 1))}})


def train_step(
    model: FCN,
    variables: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    optim: OptimConfig,
    settings: Settings,
    variant: str,
) -> Runner:
    """Make the runner of a training step: forward, mean softmax cross-entropy, backward, ``torch.optim.SGD``."""
    twin = _twin(model, variables, settings, variant).train()
    before = {name: _array(p) for name, p in twin.named_parameters()}
    x, target = _images(images, settings, variant), torch.from_numpy(np.int64(labels)).to(_device(settings))
    sgd = torch.optim.SGD(
        twin.parameters(), lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay, fused=True
    )

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        with _autocast(settings):
            logits = twin(x)
        return F.cross_entropy(logits.float(), target, ignore_index=IGNORE)

    compiled = _compiled(loss_of, settings, variant)

    def call() -> Tensor:
        sgd.zero_grad(set_to_none=True)
        loss = compiled(x, target)
        loss.backward()
        sgd.step()
        return loss.detach()

    def numbers(loss: Tensor) -> Numbers:
        update = {name: _array(p) - before.pop(name) for name, p in twin.named_parameters()}
        running = {name: _array(b) for name, b in twin.named_buffers() if "running_" in name}
        return {"loss": {"": _array(loss)}, "update": update, **({"statistics": running} if running else {})}

    return Runner(call, _wait(settings), numbers)
