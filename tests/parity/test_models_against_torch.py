"""Every family, stride and encoder against its PyTorch twin: logits, running statistics and gradients, odd sizes too.

The reference is always the twin in float64. In float32 torch's own batch norm on the CPU is 1e-5 to 3e-4 away from it
(in the ladders and wherever padding makes large constant areas), ten to a hundred times farther than ours.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fcn_jax
from fcn_jax import weights
from fcn_jax.compare import make_twin

NUM_CLASSES = 4
IGNORE = 255

# name -> (model, options, (height, width)). BN encoders get sizes with several pixels in pool5: over one or two pixels
# the normalised values are +-1 whatever the weights, and gradients are rounding noise.
CASES = {
    "same-32s": ("fcn32s", {"encoder": "vgg11"}, (33, 50)),
    "same-16s-bn": ("fcn16s", {"encoder": "vgg13", "encoder_norm": "batch"}, (97, 71)),
    "same-8s": ("fcn8s", {"encoder": "vgg16", "fc6_kernel": 7}, (67, 45)),
    "same-8s-boostcamp": ("fcn8s", {"fc6_kernel": 1}, (64, 96)),
    "same-8s-bn19": ("fcn8s", {"encoder": "vgg19", "encoder_norm": "batch", "upsample_bias": False}, (75, 93)),
    "pad100-32s": ("fcn32s_pad100", {"encoder": "vgg13"}, (33, 47)),
    "pad100-32s-fanrencli": ("fcn32s_pad100", {"pool": "floor", "crop": (5, 9, 6)}, (52, 40)),
    "pad100-16s-fanrencli": ("fcn16s_pad100", {"pool": "floor", "skip_bias": False}, (52, 58)),
    "pad100-16s": ("fcn16s_pad100", {"encoder": "vgg11"}, (41, 34)),
    "pad100-8s": ("fcn8s_pad100", {"encoder": "vgg16"}, (37, 61)),
    "pad100-8s-atonce-bn": ("fcn8s_pad100_atonce", {"encoder": "vgg11", "encoder_norm": "batch"}, (35, 64)),
    "ladder-32s": ("fcn32s_ladder", {"encoder": "vgg16"}, (64, 96)),
    "ladder-16s": ("fcn16s_ladder", {"encoder": "vgg11"}, (65, 50)),
    "ladder-8s-bn": ("fcn8s_ladder", {"encoder": "vgg13", "encoder_norm": "batch"}, (83, 70)),
    "ladder-fcns-fcn1": ("fcns_ladder", {"encoder": "vgg13"}, (77, 64)),
    "resize-32s": ("fcn32s_resize", {"encoder": "vgg19"}, (65, 97)),
    "resize-16s-bn": ("fcn16s_resize", {"encoder": "vgg16", "encoder_norm": "batch"}, (97, 71)),
    "resize-8s-aux": ("fcn8s_resize", {"encoder": "vgg16", "aux_head": True}, (95, 66)),
}


def build(case, dtype):
    name, options, size = CASES[case]
    options = {"width": 0.0625, **options, "dtype": dtype, "param_dtype": dtype}
    if "resize" in name:
        options |= {"head_features": 6}
    elif "ladder" not in name:
        options |= {"fc_features": 16}
    if "ladder" not in name:
        options["dropout_rate"] = 0.0
    return fcn_jax.create_model(name, NUM_CLASSES, **options), size


def randomised(model, rng):
    """Replace every array, so that nothing compared is zero by initialisation and no two layers are alike."""
    shapes = jax.eval_shape(lambda: fcn_jax.init_variables(model, jax.random.key(0), (320, 320)))

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = math.prod(leaf.shape[:3])
            if path[-2].key.startswith(("upscore", "deconv")):
                fan_in /= 4  # an output pixel meets a quarter of the taps at k = 2 s
            value = rng.normal(size=leaf.shape) * math.sqrt(2 / fan_in)
        elif name == "scale":
            value = 1 + 0.2 * rng.normal(size=leaf.shape)
        elif name == "var":
            value = rng.uniform(0.5, 1.5, size=leaf.shape)
        else:
            value = 0.1 * rng.normal(size=leaf.shape)
        # Rounded to float32, so that both precisions start from the same numbers.
        return jnp.asarray(value.astype(np.float32), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_batch(size, dtype, rng):
    images = rng.normal(size=(2, *size, 3)).astype(np.float32).astype(dtype)
    labels = rng.integers(0, NUM_CLASSES, size=(2, *size))
    labels[rng.random(labels.shape) < 0.1] = IGNORE
    return images, labels


def cross_entropy(logits, labels):
    valid = labels != IGNORE
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(valid, picked, 0)) / jnp.sum(valid)


def run_jax(model, variables, images, labels):
    """Return eval logits, train logits (a tuple), gradients and new statistics, under torch's names and axes."""

    @jax.jit
    def both(variables, images):
        def loss(params):
            rest = {k: v for k, v in variables.items() if k != "params"}
            out, updated = model.apply({"params": params, **rest}, images, train=True, mutable=["batch_stats"])
            out = out if isinstance(out, tuple) else (out,)
            return sum(cross_entropy(o, labels) * w for o, w in zip(out, (1.0, 0.4))), (out, updated)  # noqa: B905

        grads, (out, updated) = jax.grad(loss, has_aux=True)(variables["params"])
        return model.apply(variables, images), out, grads, updated

    evaluated, out, grads, updated = both(variables, images)
    grads = weights.to_torch(model, {"params": grads})
    statistics = weights.to_torch(model, updated)
    return np.asarray(evaluated), [np.asarray(o) for o in out], grads, statistics


def run_torch(model, variables, images, labels):
    twin = make_twin(model)
    twin.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.to_torch(model, variables).items()})
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    twin.eval()
    with torch.no_grad():
        evaluated = twin(x).permute(0, 2, 3, 1).numpy()
    twin.train()
    out = twin(x)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum(F.cross_entropy(o, y, ignore_index=IGNORE) * w for o, w in zip(out, (1.0, 0.4)))  # noqa: B905
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    statistics = {name: b.numpy() for name, b in twin.named_buffers()}
    return evaluated, [o.detach().permute(0, 2, 3, 1).numpy() for o in out], grads, statistics


def error(ours, theirs):
    return np.linalg.norm((ours - theirs).ravel()) / np.linalg.norm(theirs.ravel())


def cancelled(model, name):
    """Whether a bias's true gradient is zero, because the BN that follows takes the mean off."""
    return model.encoder_norm == "batch" and name.startswith("vgg.conv") and name.endswith(".bias")


def draw_inputs(case, dtype):
    model, size = build(case, dtype)
    rng = np.random.default_rng(list(CASES).index(case))
    return model, randomised(model, rng), *make_batch(size, dtype, rng)


@functools.lru_cache(maxsize=1)
def reference(case):
    return run_torch(*draw_inputs(case, "float64"))


def compare(case, dtype):
    """Return the errors: eval and train logits, each statistic, gradients by name (relative, and to the global one)."""
    inputs = draw_inputs(case, dtype)
    model, size = inputs[0], inputs[2].shape[1:3]
    ours, theirs = run_jax(*inputs), reference(case)
    assert ours[0].shape == (2, *size, NUM_CLASSES)
    assert len(ours[1]) == len(theirs[1]) == (2 if case == "resize-8s-aux" else 1)
    assert ours[2].keys() == theirs[2].keys()
    assert {k for k in ours[3] if "running" in k} == {k for k in theirs[3] if "running" in k}
    global_norm = math.sqrt(sum(np.linalg.norm(g) ** 2 for g in theirs[2].values()))
    logits = [error(ours[0], theirs[0]), *(error(o, t) for o, t in zip(ours[1], theirs[1], strict=True))]
    statistics = [error(ours[3][name], theirs[3][name]) for name in ours[3] if "running" in name]
    difference = {name: np.linalg.norm((ours[2][name] - g).ravel()) / global_norm for name, g in theirs[2].items()}
    relative = {name: error(ours[2][name], g) for name, g in theirs[2].items() if not cancelled(model, name)}
    return model, logits, statistics, difference, relative


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, dtype):
    model, logits, statistics, difference, relative = compare(case, dtype)
    if dtype == "float64":
        # Both sum the same terms in another order: a few thousand over at most 40 layers at 2e-16 each, with room.
        assert max(logits) <= 1e-10
        assert max(statistics, default=0) <= 1e-10
        assert {name: e for name, e in relative.items() if not e <= 1e-10} == {}
        # Zero but for rounding, in both.
        assert {name: e for name, e in difference.items() if cancelled(model, name) and not e <= 1e-12} == {}
    else:
        # The same sums at 6e-8 each, which batch norms over narrow layers amplify.
        assert max(logits) <= 1e-5
        assert max(statistics, default=0) <= 1e-5
        # A rounding error that flips a ReLU or the winner of a pooling window moves a whole gradient to another place;
        # two float32 backends of torch itself differ by up to 2e-4.
        assert {name: e for name, e in difference.items() if not e <= 1e-3} == {}


def test_every_encoder_with_and_without_norm_is_among_the_cases():
    seen = {(options.get("encoder", "vgg16"), options.get("encoder_norm")) for _, options, _ in CASES.values()}
    assert seen == {(f"vgg{n}", norm) for n in (11, 13, 16, 19) for norm in (None, "batch")}
