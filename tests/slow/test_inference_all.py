"""Every network in larger arrays and by tiles: logits and classes are those of the image alone."""

import pytest
from inference_cases import check_padding, check_tiles

from fcn_jax.models.catalog import MODELS

# Those of stride 8 and less have all the maps that the coarser ones have.
PADDED = {name: {} for name, spec in MODELS.items() if spec.stride <= 8} | {
    "fcn8s with batch norm": {"encoder_norm": "batch"},
    "fcn8s_ladder with batch norm": {"encoder_norm": "batch"},
    "fcn16s_resize with batch norm": {"encoder_norm": "batch"},
    "fcn8s with 1x1 fc6": {"fc6_kernel": 1},
}


@pytest.mark.parametrize("case", PADDED)
def test_logits_in_a_larger_array_are_those_of_the_image_alone(case):
    check_padding(case.split()[0], ((33, 70), (64, 96), (1, 95), (50, 3)), **PADDED[case])


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 70) for name in MODELS), ("fcn16s", 680), ("fcn8s_resize", 680), ("fcn8s_resize", 20)]
)
def test_tiles_give_the_classes_of_the_whole_image(name, width):
    check_tiles(name, width)
