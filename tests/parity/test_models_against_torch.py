"""Every family and stride against its PyTorch twin; all encoders, options and precisions are in tests/slow."""

import pytest
from twin_cases import check_case

BN = {"encoder_norm": "batch"}
BOTH = ("float64", "float32")

# name, options, (height, width), precisions
CASES = [
    ("fcn32s", {}, (33, 5), BOTH[:1]),
    ("fcn16s", BN, (65, 41), BOTH),
    ("fcn8s", {"skip_scales": (0.5, 0.1)}, (33, 37), BOTH[:1]),
    ("fcn32s_pad100", {"pool": "floor", "crop": (5, 9, 6)}, (26, 30), BOTH[:1]),
    ("fcn16s_pad100", {"skip_bias": False}, (4, 5), BOTH[:1]),
    ("fcn8s_pad100_atonce", {}, (3, 6), BOTH[:1]),
    ("fcn32s_ladder", {}, (33, 31), BOTH[:1]),
    ("fcn16s_ladder", {}, (40, 33), BOTH[:1]),
    ("fcn8s_ladder", {}, (31, 50), BOTH),
    ("fcns_ladder", BN, (65, 64), BOTH[:1]),
    ("fcn32s_resize", {}, (70, 65), BOTH[:1]),
    ("fcn16s_resize", {}, (65, 67), BOTH[:1]),
    ("fcn8s_resize", {"aux_head": True, **BN}, (64, 96), BOTH[:1]),
]


@pytest.mark.parametrize(("name", "options", "size", "dtypes"), CASES, ids=[case[0] for case in CASES])
def test_equals_torch(name, options, size, dtypes):
    check_case(name, {"encoder": "vgg11", **options}, size, dtypes)
