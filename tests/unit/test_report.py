"""report.html: its figures are the run's, it links to nothing, and names with markup are shown as they are."""

import base64
import html
import json
import re

import cv2
import numpy as np
from report_runs import CLASSES, evaluate_examples, make_run

from fcn_jax.cli.report import main
from fcn_jax.evaluation.figures import colour_labels
from fcn_jax.training.run import DatasetInfo


def text_of(page):
    """Return the words of a page outside of its scripts and tags."""
    return " ".join(html.unescape(re.sub(r"<(script|style)>.*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_the_lowest_and_highest_images_of_a_split_are_returned():
    evaluation = evaluate_examples(extremes=2)
    # Image i has i of 12 rows wrong; with 6 wrong rows both classes have an IoU of a third.
    assert [sample.name for sample in evaluation.ranked] == ["image11", "image10", "image1", "image0"]
    assert np.allclose([sample.mean_iu for sample in evaluation.ranked], [1 / 23, 2 / 22, 11 / 13, 1])
    assert not evaluate_examples().ranked and evaluate_examples(extremes=6).ranked[6].name == "image5"


def test_the_report_of_a_run_shows_its_scores_and_links_to_nothing(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    saved = {"scores": {"mean_iu": 0.4321, "pixel_accuracy": 0.8765}, "split": "shapes/test", "views": "plain"}
    (run / "eval_shapes-test.json").write_text(json.dumps({**saved, "step": 100, "images": 7}))
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    tags = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert len(page) < 3e6 and not re.search(r"""(src|href)=["'](?!data:)""", tags)
    text = text_of(page)
    # IoU of star is 60 / (100 + 110 - 60), its accuracy 0.6, its share 100 of 1400.
    assert "star 40.00 60.00 7.14" in text and "<b>disc" in text
    assert "shapes/test plain 100 7 43.21 87.65" in text
    assert "image11: 4.35" in text and "Images with the lowest mean IoU" in text
    assert re.search(r"run 75 0\.5 - - - Medians", text)  # images/s and seconds a step


def test_examples_are_thumbnails_of_image_truth_and_prediction(tmp_path):
    worst = json.loads((make_run(tmp_path / "run") / "examples.json").read_text())[0]
    data = {name: base64.b64decode(worst[name].partition(",")[2]) for name in ("image", "truth", "prediction")}
    pictures = {name: cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for name, d in data.items()}
    sample = evaluate_examples(extremes=2).ranked[0]
    assert worst["image"].startswith("data:image/jpeg")
    np.testing.assert_array_equal(pictures["truth"], colour_labels(sample.label, CLASSES.palette))
    np.testing.assert_array_equal(pictures["prediction"], colour_labels(sample.prediction, CLASSES.palette))


def test_several_runs_are_shown_with_the_settings_that_differ(tmp_path, capsys):
    first, second = make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.2, examples=False)
    assert main([str(first), str(second), "--out", str(tmp_path / "new/both.html")]) == 0
    text = text_of((tmp_path / "new/both.html").read_text())
    assert "optim.lr 0.1 0.2" in text and "data.train" not in text.partition("Curves")[0]
    assert "star 40.00 60.00 7.14 40.00 60.00 7.14" in text


def test_a_report_of_many_classes_and_log_rows_has_3_mb_at_most(tmp_path, capsys):
    confusion = np.random.default_rng(0).integers(1, 100, (150, 150))
    names = ("wall", *(f"class {i}" for i in range(148)), "wall")  # a name twice
    classes = DatasetInfo("many", names, ((1, 2, 3),) * 150)
    runs = [make_run(tmp_path / name, classes=classes, confusion=confusion, train_rows=20_000) for name in "abc"]
    assert main([*map(str, runs), "--out", str(tmp_path / "all.html")]) == 0
    page = (tmp_path / "all.html").read_text()
    assert len(page) < 3e6 and "wall (149)" in text_of(page)


def test_damaged_rows_and_files_are_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    val = (run / "metrics.jsonl").read_text().splitlines()[-1]
    damaged = [{"confusion": [[1, 2], [3]]}, {"confusion": None}, {"confusion": [["x"] * 3] * 3}, {}]
    rows = [json.dumps({"kind": "val", "step": 101, "split": "x", **row}) for row in damaged]
    rows += ['{"kind": "train", "step": 102, "loss": "low", "images_per_s": null}']
    (run / "metrics.jsonl").write_text("\n".join([val, *rows]) + "\n")
    elsewhere = dict.fromkeys(("image", "truth", "prediction"), "https://example.org/x.png")
    for name in ("examples.json", "eval_a.json"):
        (run / name).write_text(json.dumps([{"name": 3, "mean_iu": 0.5, **elsewhere}]))
    (run / "eval_b.json").write_text('{"split": 1, "views": 2, "step": 3, "images": 4, "scores": {"mean_iu": "x"}}')
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "environment": ["x"]}))
    assert main([str(run)]) == 0
    page = text_of((run / "report.html").read_text())
    assert "step 100: 65.54" in page and "Images with the" not in page


def test_the_best_step_is_that_of_the_highest_defined_score(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    empty = {"kind": "val", "step": 10, "split": "shapes/val", "confusion": np.zeros((3, 3), int).tolist()}
    (run / "metrics.jsonl").write_text(json.dumps(empty) + "\n" + (run / "metrics.jsonl").read_text())
    assert main([str(run)]) == 0
    assert "step 50: 65.54" in text_of((run / "report.html").read_text())


def test_what_has_no_report_is_one_line(tmp_path, fails):
    run = make_run(tmp_path / "run")
    fails(main, [], "the folder of a run")
    fails(main, [run, run], "--out FILE.html")
    fails(main, [run, "--out", run / "config.json"], "a name that ends in .html")
    (tmp_path / "folder.html").mkdir()
    fails(main, [run, "--out", tmp_path / "folder.html"], "is a folder")
    fails(main, [tmp_path / "none"], "none has no config.json")
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(rows[0] + "\n")
    fails(main, [run], "has no validation yet")
