"""The parity comparison of other families, dtypes and implementations; slower measurements of the benchmark."""

import json

import pytest
from parity.test_benchmarks import check_pipeline
from parity.test_numerics import COMMAND, OPTIM, SMALL_HEAD, build, check_agreement, check_low_precision, parity

from fcn_jax.compare.experiments import Case, against_jax, against_torch
from fcn_jax.compare.report import summary_table


@pytest.mark.parametrize(("name", "options"), [("fcn8s_ladder", {}), ("fcn8s_resize", {"aux_head": True})])
def test_float64_agrees_with_torch_in_every_part_and_over_sgd_steps(name, options):
    case = Case(*build(name, **options), "float64", steps=4, optim=OPTIM)
    check_agreement(against_torch(case), case.model)


def test_bfloat16_report_shows_the_error_of_each_side(tmp_path):
    check_low_precision("bfloat16", tmp_path)


def test_every_pair_of_jax_implementations_is_compared():
    case = Case(*build("fcn32s", **SMALL_HEAD), "float64", steps=2)
    reports = {f"{report.ours} | {report.theirs}": report for report in against_jax(case)}
    assert list(reports) == [
        "pmap x 2 | one device", "mesh x 2 | one device", "float32 | float64", "default | highest", "high | highest",
        "polyphase | dilated", "remat | stored",
    ]  # fmt: skip
    for name, report in reports.items():
        # Rounding of float32, or float64 sums in another order.
        limit = 1e-3 if name == "float32 | float64" else 1e-10
        for part in ("layers", "loss", "gradients", "steps"):
            assert report.worst(part)[1] <= limit, (name, part, report.worst(part))
    # Different implementations differ in the last bits.
    assert reports["float32 | float64"].worst("layers")[1] > 1e-8
    assert reports["polyphase | dilated"].worst("layers")[1] > 0
    assert summary_table(list(reports.values())).row_count == 7


def test_parity_command_against_jax_writes_every_pair(tmp_path):
    arguments = ["--against", "jax", "--steps", 1, "--max-error", 1e-2, "--max-error-of", "layers", "--out", tmp_path]
    assert parity(*COMMAND, *arguments) == 0
    reports = json.loads((tmp_path / "parity.json").read_text())["reports"]
    assert [each["ours"] for each in reports] == ["pmap x 2", "mesh x 2", "float32", "default", "high", "remat"]
    assert (tmp_path / "parity.png").is_file()


def test_input_pipeline_is_measured_with_worker_processes(tmp_path, monkeypatch, capsys):
    fast, slow = check_pipeline(tmp_path, monkeypatch, capsys)
    assert fast["images_per_core_s"] > 0 and slow["images_per_core_s"] is None
    assert [fast["workers"], slow["workers"]] == [0, 2]
