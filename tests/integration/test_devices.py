"""The training step: its result does not depend on the number of devices or the parallel mode."""

import functools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcn_jax
from fcn_jax import devices
from fcn_jax.cli import eval as cli_eval
from fcn_jax.cli import train as cli_train
from fcn_jax.config import OptimConfig
from fcn_jax.devices import make_mesh, make_parallel
from fcn_jax.errors import InputError
from fcn_jax.losses import make_loss
from fcn_jax.optim import make_optimizer
from fcn_jax.preprocessing import normalize
from fcn_jax.step import make_train_step, new_state

BATCH = 16
OPTIONS = {
    "fcn8s": {"encoder": "vgg11", "encoder_norm": "batch", "fc_features": 8, "fc6_kernel": 3},
    "fcn8s_resize": {"encoder": "vgg11", "aux_head": True, "dropout_rate": 0.5},
    "fcns_ladder": {"encoder": "vgg11"},
    "fcn16s": {"encoder": "vgg11", "fc_features": 8, "fc6_kernel": 1},
    "fcn8s_pad100": {"encoder": "vgg11", "fc_features": 8},
    "fcn_resnet50": {"aux_head": True},
}
WEIGHTS = np.array([1.0, 2.0, 0.5, 1.0])


def make_batch(height):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (BATCH, height, 32, 3), dtype=np.uint8)
    label = rng.integers(0, 4, (BATCH, height, 32)).astype(np.uint8)
    for i in range(BATCH):
        label[i, : 2 * i] = 255  # the devices get very unequal numbers of valid pixels
    return {"image": image, "label": label}


def take_steps(name, mode, devices, steps=2, height=33, axes=(), loss="softmax", **options):
    """Return the change of parameters and statistics as one vector, and the last step's sums."""
    model = fcn_jax.create_model(name, 4, width=0.03, dtype=jnp.float64, param_dtype=jnp.float64, **OPTIONS[name])
    variables = fcn_jax.init_variables(model, jax.random.key(0))
    # Score layers start at zero; with noise, no gradient is trivially zero.
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(variables["params"])))
    leaves, tree = jax.tree.flatten(variables["params"])
    leaves = [x + 0.05 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, noise, strict=True)]
    variables["params"] = jax.tree.unflatten(tree, leaves)
    optimizer = make_optimizer(variables["params"], OptimConfig(lr=0.05, bias_lr=2.0, bias_decay=False), 10)

    def make_step(axis_name, **rest):
        network = model.clone(axis_name=axis_name)

        def apply_fn(variables, images, **keywords):
            return network.apply(variables, normalize(images, "imagenet", jnp.float64), **keywords)

        rest |= options | {"axis_name": axis_name, "pass_example_ids": True}
        return make_train_step(apply_fn, optimizer, make_loss(loss, WEIGHTS), **rest)

    parallel = make_parallel(mode, make_step, make_mesh(jax.devices()[:devices], *axes))
    start = new_state(variables, optimizer, seed=3)
    state, placed = parallel.place_state(jax.tree.map(jnp.copy, start)), parallel.place_batch(make_batch(height))
    for _ in range(steps):
        state, sums = parallel.step(state, placed)
    if axes and axes[0] > 1:  # fsdp and space; the arrays are as large as their part on a device
        assert any(x.addressable_shards[0].data.size * axes[0] == x.size for x in jax.tree.leaves(state.params))
    if axes and axes[1] > 1:
        assert placed["image"].addressable_shards[0].data.shape[1] * axes[1] == height
    pair = (state.params, state.batch_stats), (start.params, start.batch_stats)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), *pair)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(moved)]), jax.device_get(sums)


@functools.cache
def on_one_device(name, **options):
    return take_steps(name, "pmap", 1, **options)


def assert_equals_one_device(name, mode, devices, axes=(), **options):
    expected, expected_sums = on_one_device(name, **options)
    moved, sums = take_steps(name, mode, devices, axes=axes, **options)
    # float64: only the order of the sums over examples differs.
    assert np.linalg.norm(moved - expected) <= 1e-11 * np.linalg.norm(expected)
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-11)
    assert np.linalg.norm(expected) > 0


QUICK = [("pmap", 2, 1), ("mesh", 8, 1)]
SLOW_CASES = [("pmap", 2, 2), ("pmap", 8, 1), ("pmap", 8, 2), ("mesh", 2, 1), ("mesh", 2, 2), ("mesh", 8, 2)]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


REGIONS = {"focal": 1, "dice": 1, "lovasz": 1}


@pytest.mark.parametrize(("devices", "accumulate"), [(2, 2), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_region_losses_add_up_over_devices_and_accumulated_parts(devices, accumulate):
    expected, _ = take_steps("fcn8s_pad100", "pmap", 1, loss=REGIONS)
    moved, _ = take_steps("fcn8s_pad100", "pmap", devices, accumulate=accumulate, loss=REGIONS)
    # float64 sums in another order.
    assert np.linalg.norm(moved - expected) <= 1e-11 * np.linalg.norm(expected)


@pytest.mark.parametrize(("mode", "devices", "accumulate"), [*QUICK, *SLOW])
def test_the_step_is_the_same_on_any_number_of_devices(mode, devices, accumulate):
    assert_equals_one_device("fcn8s", mode, devices, accumulate=accumulate)


SHARDED = [("fcn8s", (2, 2))]
SLOW_SHARDED = [("fcn8s_resize", (2, 2)), ("fcns_ladder", (2, 2)), ("fcn_resnet50", (2, 2)), ("fcn8s_pad100", (2, 4))]
SLOW_SHARDED += [("fcn8s", (8, 1)), ("fcn8s", (1, 4)), ("fcn8s_pad100", (1, 2))]


@pytest.mark.parametrize(
    ("name", "axes"), [*SHARDED, *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW_SHARDED)]
)
def test_a_mesh_that_splits_parameters_and_images_takes_the_same_step(name, axes, monkeypatch):
    monkeypatch.setattr(devices, "SMALLEST", 100)
    assert_equals_one_device(name, "mesh", 8, axes=axes, height=32 * max(2, axes[1]))


@pytest.mark.parametrize("axes", [(1, 2), pytest.param((1, 4), marks=pytest.mark.slow)])
def test_a_mesh_may_split_images_alone(axes):
    assert_equals_one_device("fcn8s", "mesh", axes[1], axes=axes, height=32 * axes[1])


def test_fsdp_stores_an_eighth_of_parameters_and_momentum_per_device():
    model = fcn_jax.create_model("fcn8s", 21)
    variables = jax.eval_shape(lambda key: fcn_jax.init_variables(model, key), jax.random.key(0))
    optimizer = make_optimizer(variables["params"], OptimConfig(), 10)
    state = jax.eval_shape(lambda v: new_state(v, optimizer), variables)
    lies = devices.state_shardings(state, make_mesh(jax.devices(), 8))
    parts = jax.tree.map(lambda x, where: np.prod(where.shard_shape(x.shape)), state, lies)
    whole = sum(np.prod(x.shape) for x in jax.tree.leaves(state))
    # An eighth, and small arrays that are not split.
    assert sum(jax.tree.leaves(parts)) < 0.126 * whole


@pytest.mark.parametrize(
    ("axes", "count", "message"),
    [
        ("data=4,row=2", None, "expected --mesh such as data=4,space=2"),
        ("data=4,space=2", 4, "--mesh data=4,space=2 has 8 devices, but --devices is 4"),
        ("data=16", None, "expected devices in 1 ... 8, got 16"),
        ("space=3", None, "fsdp x space is 3, which does not divide the 8 devices of a process"),
    ],
)
def test_invalid_meshes_are_rejected(axes, count, message):
    with pytest.raises(InputError, match=message):
        devices.pick_mesh(axes, count)


def test_heights_that_cannot_be_split_are_rejected_with_the_nearest_ones():
    mesh = devices.pick_mesh("space=4")
    assert mesh.shape == {"data": 2, "fsdp": 1, "space": 4}
    devices.check_height(256, mesh)
    with pytest.raises(InputError, match="multiples of 128, got 360; the nearest is 256 or 384; set --data.crop-size"):
        devices.check_height(360, mesh)
    with pytest.raises(InputError, match="got images of different heights; the nearest is 128"):
        devices.check_height(None, mesh)
    with pytest.raises(InputError, match="--parallel pmap does not support the axes fsdp and space"):
        make_parallel("pmap", lambda **_: None, mesh)


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh_and_is_evaluated_on_a_third(tmp_path):
    size = "--model.encoder vgg11 --model.width 0.125 --model.fc-features 64 --model.fc6-kernel 3 --train.batch-size 8"
    size += " --data.crop-size 64 64 --data.shapes-count 64 --data.workers 0 --train.eval-every 0.25"
    paths = ["--run", str(tmp_path / "run"), "--data.cache-dir", str(tmp_path / "cache")]
    words = ["shapes", *size.split(), *paths]
    assert cli_train.main([*words, "--train.steps", "2", "--optim.schedule", "fixed", "--mesh", "fsdp=4,space=2"]) == 0
    assert cli_train.main(["--resume", str(tmp_path / "run"), "--train.steps", "4", "--mesh", "data=2,space=2"]) == 0
    scores = []
    for axes in ("data=1", "data=2,space=2"):
        assert cli_eval.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / axes), "--mesh", axes]) == 0
        scores.append(json.loads((tmp_path / axes / "eval.json").read_text())["confusion"])
    # Rounding in float32 may change the class of a pixel whose two best classes are almost equal.
    assert np.abs(np.subtract(*scores)).sum() <= 1e-3 * np.sum(scores[0])


def test_the_weight_is_that_of_the_valid_pixels_of_the_global_batch():
    _, sums = on_one_device("fcn8s", accumulate=1)
    labels = make_batch(33)["label"]
    weights = WEIGHTS[np.where(labels == 255, 0, labels)] * (labels != 255)
    assert sums.pixels == pytest.approx(weights.sum(), rel=1e-14)  # summed in another order


def step_of_scales(**options):
    """Take a step of a model that multiplies each channel of its images, on two devices; return state and sums."""
    params, rng = {"w": jnp.linspace(0.5, 2.0, 4)}, np.random.default_rng(0)
    optimizer, loss = make_optimizer(params, OptimConfig(), 1), make_loss("softmax", WEIGHTS)
    make_step = partial(make_train_step, lambda v, x, **_: (x * v["params"]["w"], {}), optimizer, loss, **options)
    parallel, label = make_parallel("pmap", make_step, make_mesh(jax.devices()[:2])), rng.integers(0, 4, (8, 5, 5))
    label[:3, :2] = 255
    batch = parallel.place_batch({"image": rng.normal(size=(8, 5, 5, 4)), "label": label})
    return jax.device_get(parallel.step(parallel.place_state(new_state({"params": params}, optimizer)), batch))


def test_sum_reduction_is_the_mean_times_the_weight():
    summed, mean = step_of_scales(reduction="sum")[1], step_of_scales()[1]
    # Rounding of float64.
    assert summed.loss == pytest.approx(mean.loss * mean.pixels, rel=1e-12)
    assert summed.grad_norm == pytest.approx(mean.grad_norm * mean.pixels, rel=1e-12)


def test_accumulation_without_batch_norm_equals_the_whole_batch():
    (whole, whole_sums), (parts, parts_sums) = step_of_scales(), step_of_scales(accumulate=2)
    # float64 sums in another order.
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], rtol=1e-11)
    np.testing.assert_allclose(parts_sums, whole_sums, rtol=1e-11)


@pytest.mark.slow
def test_accumulation_of_fcn16s_equals_the_whole_batch():
    whole, whole_sums = take_steps("fcn16s", "pmap", 2)
    parts, parts_sums = take_steps("fcn16s", "pmap", 2, accumulate=4)
    # float64 sums in another order.
    assert np.linalg.norm(parts - whole) <= 1e-11 * np.linalg.norm(whole)
    np.testing.assert_allclose(parts_sums, whole_sums, rtol=1e-11)


def test_accumulated_parts_take_interleaved_examples():
    seen = []

    def apply_fn(variables, images, example_ids, **options):
        jax.debug.callback(lambda ids: seen.append(ids.tolist()), example_ids, ordered=True)
        return images * variables["params"]["w"], {}

    optimizer = fcn_jax.optim.make_optimizer({"w": jnp.ones(())}, OptimConfig(), 1)
    step = make_train_step(apply_fn, optimizer, make_loss("softmax"), accumulate=2, pass_example_ids=True)
    batch = {"image": jnp.ones((6, 2, 2, 3)), "label": jnp.zeros((6, 2, 2), jnp.int32)}
    jax.block_until_ready(step(new_state({"params": {"w": jnp.ones(())}}, optimizer), batch))
    jax.effects_barrier()
    assert seen == [[0, 2, 4], [1, 3, 5]]


def test_initial_parameters_and_dropout_masks_have_different_keys():
    state = new_state({"params": {}}, fcn_jax.optim.make_optimizer({}, OptimConfig(), 1), seed=5)
    assert not np.array_equal(state.key, jax.random.key_data(jax.random.key(5)))
