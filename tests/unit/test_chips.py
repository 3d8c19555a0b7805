from types import SimpleNamespace

import pytest

from fcn_jax.chips import peak_of

# Device kinds as libtpu 0.0.52 and CUDA report them; peaks in TFLOP/s.
KINDS = {
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H100 PCIe": None,
    "TPU7x": None,
    "cpu": None,
}


@pytest.mark.parametrize(("kind", "peak"), KINDS.items())
def test_peak_flops_by_device_kind(kind, peak):
    assert peak_of(SimpleNamespace(device_kind=kind)) == (peak and pytest.approx(peak * 1e12))
