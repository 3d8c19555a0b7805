"""The gradient of each image's loss, and how large it is: python examples/per_example_gradients.py."""

import jax
import numpy as np
import optax

import fcn_jax

rng = np.random.default_rng(0)
images = fcn_jax.normalize(rng.integers(0, 256, (4, 32, 48, 3), dtype=np.uint8), "imagenet")
labels = rng.integers(0, 5, (4, 32, 48))
model = fcn_jax.create_model("fcn8s", num_classes=5, encoder="vgg11", width=0.0625, fc6_kernel=1)
variables = fcn_jax.init_variables(model, jax.random.key(0))
loss = fcn_jax.losses.make_loss("softmax")


def mean_loss(params, images, labels):
    """Return the mean loss over the pixels of some images."""
    total, weight = loss(model.apply({"params": params}, images), labels)
    return total / weight


def loss_of_one(params, image, label):
    """Return the loss of one image (h, w, 3)."""
    return mean_loss(params, image[None], label[None])


gradients = jax.jit(jax.vmap(jax.grad(loss_of_one), in_axes=(None, 0, 0)))
whole_gradient = jax.jit(jax.grad(mean_loss))

if __name__ == "__main__":
    each = gradients(variables["params"], images, labels)
    norms = jax.vmap(optax.tree.norm)(each)
    whole = whole_gradient(variables["params"], images, labels)
    mean = jax.tree.map(lambda x: x.mean(0), each)  # all images have equally many pixels
    difference = optax.tree.norm(optax.tree.sub(mean, whole)) / optax.tree.norm(whole)
    print("gradient norm of each image:", " ".join(f"{norm:.4f}" for norm in norms))
    print(f"their mean against the gradient of the batch: {difference:.1e} relative")
