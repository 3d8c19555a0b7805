"""Train an FCN on NumPy arrays of your own, with any optax optimiser: python examples/train_on_arrays.py [STEPS]."""

import sys

import jax
import numpy as np
import optax

import fcn_jax


def make_data(count, size=64, classes=3, seed=0):
    """Draw bright and dark squares on noise: images uint8 (count, size, size, 3), labels (count, size, size)."""
    rng = np.random.default_rng(seed)
    images = rng.integers(90, 160, (count, size, size, 3), dtype=np.uint8)
    labels = np.zeros((count, size, size), np.uint8)
    for image, label in zip(images, labels, strict=True):
        for kind in range(1, classes):
            top, left = rng.integers(0, size // 2, 2)
            image[top : top + 24, left : left + 24] = 30 if kind == 1 else 230
            label[top : top + 24, left : left + 24] = kind
    labels[:, 0] = 255  # ignored
    return images, labels


def main(steps):
    """Train, and return the mean IoU on images that were held out."""
    images, labels = make_data(64)
    model = fcn_jax.create_model("fcn8s", num_classes=3, encoder="vgg11", encoder_norm="batch", width=0.125)
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))
    train_step = fcn_jax.make_train_step(model.apply, optimizer, fcn_jax.losses.make_loss("softmax"))
    train_step = jax.jit(fcn_jax.cpu_kernels(jax.default_backend() == "cpu")(train_step), donate_argnums=0)
    state, rng = fcn_jax.new_state(variables, optimizer), np.random.default_rng(0)
    for step in range(steps):
        chosen = rng.choice(len(images), 8, replace=False)
        batch = {"image": fcn_jax.normalize(images[chosen], "imagenet"), "label": labels[chosen]}
        state, sums = train_step(state, batch)
        if step % 20 == 0:
            print(f"step {step}: loss {sums.loss:.3f}")

    images, labels = make_data(16, seed=1)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = jax.jit(model.apply)(variables, fcn_jax.normalize(images, "imagenet"))
    confusion = fcn_jax.metrics.confusion_matrix(labels, logits.argmax(-1), num_classes=3)
    scores = fcn_jax.metrics.scores(confusion)
    print(f"held out: mean IoU {scores.mean_iu:.3f}, pixel accuracy {scores.pixel_accuracy:.3f}")
    return scores.mean_iu


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
