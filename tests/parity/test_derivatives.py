"""`model.apply` is plain JAX: differentiable in every mode and order, and exported with symbolic sizes."""

import derivative_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import make_network

# The cheapest cases that cover batch norm, pooling and upsampling. The slow tests have the other combinations.
QUICK = {
    derivative_cases.check_modes: [("fcn8s_resize", "batch", True)],
    derivative_cases.check_hessian_against_torch: [("fcn8s", None, False), ("fcn8s_resize", "batch", True)],
    derivative_cases.check_vmap: [("fcn8s", "batch", True)],
}
CASES = [
    pytest.param(check, *case, marks=[] if case in quick else pytest.mark.slow)
    for check, quick in QUICK.items()
    for case in derivative_cases.CASES
]


@pytest.mark.parametrize(("check", "family", "norm", "train"), CASES)
def test_derivatives_and_vmap_equal_their_references(check, family, norm, train):
    check(family, norm, train)


# `resize` and `dilated` build their interpolation matrices on the host, so the size has to be known.
SYMBOLIC = {
    "fcn8s": "b, h, w, 3", "fcn8s_pad100": "b, h, w, 3", "fcn8s_ladder": "b, h, w, 3",
    "fcn8s_resize": "b, 64, 96, 3", "fcn_resnet50": "b, 64, 96, 3",
}  # fmt: skip


@pytest.mark.parametrize("family", [*SYMBOLIC][:-1] + [pytest.param("fcn_resnet50", marks=pytest.mark.slow)])
def test_a_network_is_exported_with_symbolic_batch_and_size(family):
    model, variables = make_network(family, **({} if "resnet" in family else {"encoder_norm": "batch"}))
    shape = jax.export.symbolic_shape(SYMBOLIC[family])
    apply = jax.jit(lambda images: model.apply(variables, images))
    exported = jax.export.export(apply)(jax.ShapeDtypeStruct(shape, jnp.float64))
    rng = np.random.default_rng(0)
    for size in [(1, 64, 96, 3), (2, 97, 70, 3) if "h" in SYMBOLIC[family] else (2, 64, 96, 3)]:
        images = jnp.asarray(rng.normal(size=size))
        np.testing.assert_allclose(exported.call(images), apply(images), rtol=0, atol=1e-12)  # rounding of float64
