"""Every family, stride and encoder against its PyTorch twin, in both precisions and at odd sizes."""

import pytest
from twin_cases import check_case

# name -> (model, options, (height, width))
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
    "resize-16s-bn-frozen": (
        "fcn16s_resize",
        {"encoder": "vgg11", "encoder_norm": "batch", "freeze_stages": 2},
        (97, 71),
    ),
    "resize-8s-aux": ("fcn8s_resize", {"encoder": "vgg16", "aux_head": True}, (95, 66)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_network_equals_its_torch_twin(case):
    check_case(*CASES[case], ("float64", "float32"))


# Only in float64: in float32, fifty batch norms in sequence amplify rounding to 1e-4 of the logits on both sides.
@pytest.mark.parametrize("frozen", [0, 4])
def test_a_dilated_network_equals_its_torch_twin(frozen):
    check_case("fcn_resnet50", {"aux_head": True, "freeze_stages": frozen}, (40, 56), ("float64",))
