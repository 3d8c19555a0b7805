"""Hessian-vector products, and the largest eigenvalue by power iteration: python examples/hessian.py."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fcn_jax

rng = np.random.default_rng(0)
images = fcn_jax.normalize(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8), "imagenet")
labels = rng.integers(0, 5, (2, 64, 64))
model = fcn_jax.create_model("fcn8s_resize", num_classes=5, encoder="vgg11", encoder_norm="batch", width=0.125)
variables = fcn_jax.init_variables(model, jax.random.key(0))
point, unravel = ravel_pytree(variables["params"])
loss = fcn_jax.losses.make_loss("softmax")


def mean_loss(point):
    """Return the mean loss of the parameters, given as one vector; batch norm by its running statistics."""
    logits = model.apply({**variables, "params": unravel(point)}, images, train=False)
    total, weight = loss(logits, labels)
    return total / weight


@jax.jit
def hessian_times(point, vector):
    """Differentiate the gradient along a vector: forward mode over reverse mode, without the Hessian itself."""
    return jax.jvp(jax.grad(mean_loss), (point,), (vector,))[1]


def largest_eigenvalue(iterations=30):
    """Return the eigenvalue of the largest magnitude and how far its vector is from an eigenvector."""
    vector = jax.random.normal(jax.random.key(1), point.shape)
    for _ in range(iterations):
        vector = vector / jnp.linalg.norm(vector)
        product = hessian_times(point, vector)
        value, vector = vector @ product, product
    residual = jnp.linalg.norm(hessian_times(point, vector) - value * vector) / jnp.linalg.norm(vector)
    return float(value), float(residual / abs(value))


if __name__ == "__main__":
    value, residual = largest_eigenvalue()
    print(f"{point.size} parameters; largest eigenvalue {value:.4f}, relative residual {residual:.1e}")
