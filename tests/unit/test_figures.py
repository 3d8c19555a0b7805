import cv2
import numpy as np
from PIL import Image

from fcn_jax.evaluation.evaluate import Sample, spread
from fcn_jax.evaluation.figures import (
    colour_labels,
    overlay,
    save_confusion,
    save_curves,
    save_palette_png,
    save_panel,
    save_predictions,
)

PALETTE = ((0, 0, 0), (200, 10, 20), (3, 4, 5))
LABELS = np.array([[0, 1], [2, 255]], np.uint8)


def test_labels_take_the_palettes_colours_and_void_its_own():
    expected = [[[0, 0, 0], [200, 10, 20]], [[3, 4, 5], [224, 224, 192]]]
    np.testing.assert_array_equal(colour_labels(LABELS, PALETTE), expected)


def test_an_overlay_is_half_image_half_colour():
    image = np.full((2, 2, 3), 100, np.uint8)
    np.testing.assert_array_equal(overlay(image, LABELS, PALETTE)[0, 1], [150, 55, 60])


def test_a_palette_png_keeps_ids_as_indices_and_shows_colours(tmp_path):
    save_palette_png(tmp_path / "a.png", LABELS, PALETTE)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), LABELS)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), colour_labels(LABELS, PALETTE))


def test_positions_are_spread_over_the_split():
    assert spread(101) == {0, 20, 40, 60, 80, 100} and spread(3) == {0, 1, 2} and spread(0) == frozenset()


def test_panel_shows_each_samples_image_truth_and_prediction(tmp_path):
    image = np.full((4, 4, 3), (0, 0, 250), np.uint8)
    label, prediction = np.full((8, 8), 1, np.uint8), np.full((8, 8), 2, np.uint8)
    save_panel(tmp_path / "figures/panel.png", [Sample("a", image, label, prediction)] * 2, PALETTE, ("x", "y", "z"))
    picture = cv2.cvtColor(cv2.imread(str(tmp_path / "figures/panel.png")), cv2.COLOR_BGR2RGB)
    for colour in ((0, 0, 250), PALETTE[1], PALETTE[2]):
        share = np.all(np.abs(picture.astype(int) - colour) <= 2, axis=-1).mean()
        assert 0.2 < share < 0.34  # a third of the picture each, less the legend and the titles


def test_predictions_are_shown_without_image_and_truth(tmp_path):
    image, label = np.full((4, 4, 3), (0, 0, 250), np.uint8), np.full((4, 4), 1, np.uint8)
    samples = [Sample("a", image, label, np.full((4, 4), 2, np.uint8))] * 3
    palette = ((0, 0, 0), (200, 10, 20), (10, 200, 20))
    save_predictions(tmp_path / "predictions.png", samples, palette, ("x", "y", "z"))
    picture = cv2.cvtColor(cv2.imread(str(tmp_path / "predictions.png")), cv2.COLOR_BGR2RGB).astype(int)
    share = [np.all(np.abs(picture - colour) <= 2, axis=-1).mean() for colour in ((0, 0, 250), *palette[1:])]
    assert share[0] == share[1] == 0 and 0.6 < share[2] < 0.8  # three of four cells


def test_curves_and_confusion_are_drawn_with_undefined_scores_among_them(tmp_path):
    undefined = {"pixel_accuracy": 0.5, "mean_accuracy": None, "mean_iu": None, "frequency_weighted_iu": 0.1}
    rows = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "val", "step": 1, "scores": undefined}]
    save_curves(tmp_path / "curves.png", rows)
    save_curves(tmp_path / "empty.png", [])
    save_confusion(tmp_path / "confusion.png", np.array([[3, 1], [0, 0]]), ("a", "b"))
    for name in ("curves", "empty", "confusion"):
        assert cv2.imread(str(tmp_path / f"{name}.png")) is not None
