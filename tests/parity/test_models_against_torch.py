"""Every family against its PyTorch twin. The slow tests cover other strides, encoders, options and precisions."""

import pytest
from twin_cases import check_case

BN = {"encoder_norm": "batch"}
# name, options, (height, width)
CASES = [
    ("fcn32s", {}, (33, 5)), ("fcn16s", BN, (65, 41)), ("fcn8s", {"skip_scales": (0.5, 0.1)}, (33, 37)),
    ("fcn32s_pad100", {"pool": "floor", "crop": (5, 9, 6)}, (26, 30)), ("fcn8s_pad100_atonce", {}, (3, 6)),
    ("fcn16s_pad100", {"skip_bias": False}, (4, 5)), ("fcn32s_ladder", {}, (33, 31)), ("fcn16s_ladder", {}, (40, 33)),
    ("fcn8s_ladder", {}, (31, 50)), ("fcns_ladder", BN, (65, 64)), ("fcn32s_resize", {}, (70, 65)),
    ("fcn16s_resize", {}, (65, 67)), ("fcn8s_resize", {"aux_head": True, **BN}, (64, 96)),
]  # fmt: skip
FLOAT32 = {"fcn16s", "fcn8s_ladder"}  # compared in float32 as well
QUICK = {"fcn16s", "fcn8s_pad100_atonce", "fcn32s_pad100", "fcn8s_ladder", "fcn8s_resize"}
MARKED = [pytest.param(*case, id=case[0], marks=[] if case[0] in QUICK else pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize(("name", "options", "size"), MARKED)
def test_a_network_equals_its_torch_twin(name, options, size):
    dtypes = ("float64", "float32") if name in FLOAT32 else ("float64",)
    check_case(name, {"encoder": "vgg11", **options}, size, dtypes)
