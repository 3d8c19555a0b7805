"""Transposed convolution and bilinear resizing against torch and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcn_jax.models import upsample
from fcn_jax.models.kernels import conv2d, cpu_kernels
from fcn_jax.models.layers import Compute
from fcn_jax.models.upsample import TransposedConv, bilinear_kernel, resize_bilinear, transposed_conv

# (kernel, stride, padding, output_padding) of the networks (k = 2s; 3, 2, 1, 1), and others that torch supports. In
# some, output padding reaches past the kernel of the last input pixel, where the result is zero.
GEOMETRIES = (
    (4, 2, 0, 0), (4, 2, 1, 0), (16, 8, 0, 0), (16, 8, 4, 0), (32, 16, 8, 0), (64, 32, 16, 0), (3, 2, 1, 1),
    (3, 2, 0, 0), (3, 2, 1, 0), (5, 2, 2, 0), (5, 3, 1, 2), (7, 2, 3, 1), (3, 1, 1, 0), (1, 1, 0, 0), (2, 2, 0, 1),
    (2, 3, 0, 0), (2, 3, 0, 2),
)  # fmt: skip


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / max(np.linalg.norm(theirs), 1e-300)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("k", "s", "p", "op"), GEOMETRIES)
def test_transposed_conv_and_its_gradients_equal_torch(k, s, p, op, kernels):
    rng = np.random.default_rng(0)
    w, sizes = rng.normal(size=(k, k, 3, 5)), ((1, 1), (1, 4), (3, 2))
    inputs = [rng.normal(size=(2, *size, 3)) for size in sizes]
    expected = []
    for x in inputs:
        tx = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
        tw = torch.from_numpy(w).permute(2, 3, 0, 1).requires_grad_()
        ty = F.conv_transpose2d(tx, tw, stride=s, padding=p, output_padding=op)
        dy = torch.from_numpy(rng.normal(size=tuple(ty.shape)))
        ty.backward(dy)
        tensors = (dy.permute(0, 2, 3, 1), ty.permute(0, 2, 3, 1), tx.grad.permute(0, 2, 3, 1))
        expected.append([tensor.detach().numpy() for tensor in (*tensors, tw.grad.permute(2, 3, 0, 1))])

    @jax.jit
    @cpu_kernels(kernels)
    def run(w, inputs, cotangents):
        results = []
        for x, dy in zip(inputs, cotangents, strict=True):
            y, pullback = jax.vjp(lambda x, w: transposed_conv(x, w, s, p, op), x, w)
            results.append((y, *pullback(dy)))
        return results

    for ours, (dy, *theirs) in zip(run(w, inputs, [e[0] for e in expected]), expected, strict=True):
        # A few hundred products, each with an error of 2e-16, are summed in another order.
        assert ours[0].shape == dy.shape
        assert max(map(relative, ours, theirs)) <= 1e-12


@pytest.mark.parametrize(("k", "p"), [(3, 1), (5, 0), (7, 3)])
def test_phases_of_an_odd_kernel_multiply_every_tap_once(k, p, monkeypatch):
    shapes = []

    def recording(x, kernel, *args, **kwargs):
        shapes.append(kernel.shape[:2])
        return conv2d(x, kernel, *args, **kwargs)

    monkeypatch.setattr(upsample, "conv2d", recording)
    with cpu_kernels():
        transposed_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((k, k, 2, 2)), 2, p, 1)
    assert len(shapes) == 4 and sum(rows * columns for rows, columns in shapes) == k * k


def test_bilinear_kernel_by_hand():
    line = np.array([0.25, 0.75, 0.75, 0.25])
    np.testing.assert_array_equal(bilinear_kernel(4), np.outer(line, line))
    np.testing.assert_array_equal(bilinear_kernel(3), np.outer([0.5, 1, 0.5], [0.5, 1, 0.5]))
    np.testing.assert_array_equal(bilinear_kernel(1), [[1]])


@pytest.mark.parametrize("k", [4, 16, 32, 64])
def test_bilinear_weights_of_an_output_pixel_sum_to_one(k):
    s = k // 2
    phases = bilinear_kernel(k).reshape(2, s, 2, s).sum(axis=(0, 2))
    np.testing.assert_allclose(phases, 1, rtol=1e-15)  # rounding of a sum of four products


def test_a_new_upsampling_layer_interpolates_each_channel_separately():
    layer = TransposedConv(2, 4, 2, Compute(jnp.float64, jnp.float64), padding=1)
    x = jnp.stack(jnp.meshgrid(jnp.arange(5.0), jnp.arange(6.0), indexing="ij"), -1)[None]
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert set(variables["params"]) == {"kernel"}
    # Output pixel o lies at input (o + 0.5) / 2 - 0.5; a linear ramp stays one away from the border.
    rows = (np.arange(10) + 0.5) / 2 - 0.5
    columns = (np.arange(12) + 0.5) / 2 - 0.5
    # 1e-14: rounding of float64.
    np.testing.assert_allclose(y[0, 1:-1, 1:-1, 0], np.broadcast_to(rows[1:-1, None], (8, 10)), atol=1e-14)
    np.testing.assert_allclose(y[0, 1:-1, 1:-1, 1], np.broadcast_to(columns[None, 1:-1], (8, 10)), atol=1e-14)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("old", [(1, 1), (1, 3), (2, 2), (5, 3), (9, 4)])
def test_resize_equals_torch_interpolate(old, align_corners):
    rng = np.random.default_rng(2)
    sizes = ((1, 1), (1, 7), (5, 3), (8, 9), (33, 50))
    x, cotangents = rng.normal(size=(2, *old, 3)), [rng.normal(size=(2, *new, 3)) for new in sizes]
    values, pullback = jax.vjp(
        jax.jit(lambda x: [resize_bilinear(x, new, None, align_corners) for new in sizes]), jnp.asarray(x)
    )
    tx = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
    expected = [F.interpolate(tx, new, mode="bilinear", align_corners=align_corners) for new in sizes]
    for index, (y, ty, dy) in enumerate(zip(values, expected, cotangents, strict=True)):
        (gradient,) = torch.autograd.grad(ty, tx, torch.from_numpy(dy).permute(0, 3, 1, 2))
        (dx,) = pullback([jnp.asarray(c * (i == index)) for i, c in enumerate(cotangents)])
        # Weights are differences of positions up to 50, with an error of 1e-14 each.
        assert relative(y, ty.detach().permute(0, 2, 3, 1).numpy()) <= 1e-12
        assert relative(dx, gradient.permute(0, 2, 3, 1).numpy()) <= 1e-12


def test_resize_preserves_corners_and_is_linear_between():
    x = jnp.asarray([[0.0, 3.0], [6.0, 9.0]])[None, :, :, None]
    np.testing.assert_allclose(resize_bilinear(x, (3, 4))[0, :, :, 0], [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])
