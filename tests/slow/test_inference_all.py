"""Every network on padded and tiled images: logits and classes equal those of the image alone."""

import pytest
from inference_cases import check_padding, check_tiles

from fcn_jax.models.catalog import MODELS

# Networks of stride 8 or less contain all feature maps of the coarser ones.
PADDED = {name: {} for name, spec in MODELS.items() if spec.stride <= 8} | {
    "fcn8s with batch norm": {"encoder_norm": "batch"},
    "fcn8s_ladder with batch norm": {"encoder_norm": "batch"},
    "fcn16s_resize with batch norm": {"encoder_norm": "batch"},
    "fcn8s with 1x1 fc6": {"fc6_kernel": 1},
}


@pytest.mark.parametrize("case", PADDED)
def test_padding_does_not_change_the_logits_of_an_image(case):
    check_padding(case.split()[0], ((33, 70), (64, 96), (1, 95), (50, 3)), **PADDED[case])


@pytest.mark.parametrize(
    ("name", "width"), [*((name, 70) for name in MODELS), ("fcn16s", 680), ("fcn8s_resize", 680), ("fcn8s_resize", 20)]
)
def test_tiled_prediction_equals_that_of_the_whole_image(name, width):
    check_tiles(name, width)
