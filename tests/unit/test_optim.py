from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from fcn_jax.config import OptimConfig
from fcn_jax.optim import make_optimizer, make_schedule

PARAMS = {
    "vgg": {"conv1_1": {"kernel": [1.0, -2.0], "bias": [0.5]}, "bn1_1": {"scale": [1.5]}},
    "score_fr": {"kernel": [0.3], "bias": [-0.1]},
    "upscore8": {"kernel": [0.7]},
}
PARAMS = jax.tree.map(jnp.array, PARAMS, is_leaf=lambda leaf: isinstance(leaf, list))
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.2, PARAMS)


# optax evaluates schedules in float32, so values are equal to 1e-6.
def _run(config, steps=4, freeze=False):
    optimizer = make_optimizer(PARAMS, config, steps, 5 if freeze else 0)
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = optimizer.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_momentum_decay_and_schedule_follow_torch_sgd():
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, schedule="poly")
    ours = _run(config)["vgg"]["conv1_1"]["kernel"]
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        sgd.param_groups[0]["lr"] = 0.1 * (1 - step / 4) ** 0.9
        weight.grad = torch.tensor([0.3, 0.0], dtype=torch.float64)
        sgd.step()
    # optax evaluates schedules in float32.
    np.testing.assert_allclose(ours, weight.detach().numpy(), rtol=1e-7)


def test_adamw_follows_torch():
    config = OptimConfig(kind="adamw", lr=0.1, momentum=0.9, weight_decay=0.01)
    ours = _run(config)["vgg"]["conv1_1"]["kernel"]
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.999), weight_decay=0.01)
    for _ in range(4):
        weight.grad = torch.tensor([0.3, 0.0], dtype=torch.float64)
        adamw.step()
    np.testing.assert_allclose(ours, weight.detach().numpy(), rtol=1e-6)  # the schedule is evaluated in float32


def test_biases_have_twice_the_learning_rate_and_no_weight_decay():
    config = OptimConfig(lr=0.1, momentum=0.0, weight_decay=0.5, bias_lr=2.0, bias_decay=False)
    params = _run(config, steps=1)
    assert float(params["score_fr"]["bias"][0]) == pytest.approx(-0.1 - 2 * 0.1 * 0.19, rel=1e-6)
    assert float(params["score_fr"]["kernel"][0]) == pytest.approx(0.3 - 0.1 * (0.23 + 0.5 * 0.3), rel=1e-6)
    assert float(params["vgg"]["bn1_1"]["scale"][0]) == pytest.approx(1.5 - 0.1 * 0.35, rel=1e-6)


def test_head_lr_multiplies_the_learning_rate_of_the_head():
    params = _run(OptimConfig(lr=0.1, momentum=0.0, weight_decay=0.0, head_lr=10.0), steps=1)
    assert float(params["score_fr"]["kernel"][0]) == pytest.approx(0.3 - 10 * 0.1 * 0.23, rel=1e-6)
    assert float(params["vgg"]["conv1_1"]["kernel"][0]) == pytest.approx(1.0 - 0.1 * 0.3, rel=1e-6)


def test_frozen_parameters_have_no_momentum():
    optimizer = make_optimizer(PARAMS, OptimConfig(freeze_upsampling=True), 4, freeze_stages=5)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(optimizer.init(PARAMS)))
    assert shapes == [(), (1,), (1,)]  # the schedule's counter, and score_fr


def test_frozen_parameters_are_unchanged_and_the_others_move():
    params = _run(OptimConfig(lr=0.1, freeze_upsampling=True), freeze=True)
    for name in ("vgg", "upscore8"):
        jax.tree.map(np.testing.assert_array_equal, params[name], PARAMS[name])
    assert float(params["score_fr"]["kernel"][0]) != 0.3


@pytest.mark.parametrize("freeze", [False, True])
def test_clipping_uses_the_global_norm_of_trainable_parameters(freeze):
    config = OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.01, freeze_upsampling=freeze)
    moved = jax.tree.map(lambda a, b: a - b, _run(config, steps=1, freeze=freeze), PARAMS)
    assert float(optax.tree.norm(moved)) == pytest.approx(0.01, rel=1e-6)


def test_schedules_by_hand():
    base = OptimConfig(lr=1.0)
    poly = make_schedule(replace(base, schedule="poly", poly_power=0.9), 100)
    assert float(poly(50)) == pytest.approx(0.5**0.9, rel=1e-6) and float(poly(100)) == 0.0
    step = make_schedule(replace(base, schedule="step", step_every=0.4), 100)
    assert [round(float(step(s)), 4) for s in (0, 39, 41, 81)] == [1.0, 1.0, 0.1, 0.01]
    warm = make_schedule(replace(base, schedule="fixed", warmup_steps=4), 100)
    assert [float(warm(s)) for s in (0, 3, 50)] == [0.25, 1.0, 1.0]
