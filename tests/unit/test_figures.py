import io

import cv2
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fcn_jax.evaluation import figures
from fcn_jax.evaluation.evaluate import Sample, spread
from fcn_jax.evaluation.report import score_table
from fcn_jax.metrics import scores

NAMES = ("background", "$\\frac{a_b^c$", "[/c]")  # names may hold any characters
PALETTE = ((0, 0, 0), (200, 10, 20), (10, 200, 20))
LABELS = np.array([[0, 1], [2, 255]], np.uint8)
BLUE = (0, 0, 250)


def read(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def proportions(picture, colour):
    """Return the aspect ratio of the region of a colour, without the small square in the legend."""
    mask = np.all(np.abs(picture.astype(int) - colour) <= 2, axis=-1)
    height, width = (np.sum(mask.sum(axis) > mask.sum(axis).max() / 2) for axis in (1, 0))
    return width / height


def test_labels_are_coloured_by_the_palette_and_void_by_its_own_colour():
    expected = [[[0, 0, 0], [200, 10, 20]], [[10, 200, 20], [224, 224, 192]]]
    np.testing.assert_array_equal(figures.colour_labels(LABELS, PALETTE), expected)


def test_an_overlay_blends_image_and_colour_except_for_background():
    image = np.full((2, 2, 3), 100, np.uint8)
    blended = figures.overlay(image, LABELS, PALETTE, NAMES)
    np.testing.assert_array_equal(blended, [[[100, 100, 100], [150, 55, 60]], [[55, 150, 60], [162, 162, 146]]])
    np.testing.assert_array_equal(figures.overlay(image, LABELS, PALETTE, ("road", "b", "c"))[0, 0], [50, 50, 50])


@pytest.mark.parametrize("name", ["2008_000123.jpg", "a\ud800\nname " * 20, "\u9053.png"])
def test_an_overlay_shows_the_name_in_its_lower_left_corner(name):
    image, labels = np.full((100, 160, 3), 100, np.uint8), np.zeros((100, 160), np.uint8)
    changed = np.any(figures.overlay(image, labels, PALETTE, NAMES, name) != image, axis=-1)
    assert changed[-10:, :20].all(axis=-1).any() and not changed[:80].any()
    assert figures.overlay(image[:2, :3], labels[:2, :3], PALETTE, NAMES, name).shape == (2, 3, 3)


def test_an_overlay_has_a_legend_of_the_classes_shown():
    image, labels = np.full((100, 160, 3), 100, np.uint8), np.zeros((100, 160), np.uint8)
    labels[50:] = 2
    blended = figures.overlay(image, labels, PALETTE, NAMES)
    np.testing.assert_array_equal(blended[5, 5], PALETTE[2])
    assert (blended[:12, 15:30] == 255).any() and (blended[20:50] == 100).all()
    assert (figures.overlay(image, labels * 0, PALETTE, NAMES) == 100).all()


def test_a_palette_png_stores_ids_as_indices_and_shows_colours(tmp_path):
    figures.save_palette_png(tmp_path / "a.png", LABELS, PALETTE)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), LABELS)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), figures.colour_labels(LABELS, PALETTE))


def test_sample_positions_are_spread_over_the_split():
    assert spread(101) == {0, 20, 40, 60, 80, 100} and spread(3) == {0, 1, 2} and spread(0) == frozenset()


def test_a_panel_preserves_aspect_ratios_of_images_labels_and_predictions(tmp_path):
    def sample(name, shape, label, prediction, colour):
        image = np.full((4, 4, 3), colour, np.uint8)  # the network's input size differs from the label's
        return Sample(name, image, np.full(shape, label, np.uint8), np.full(shape, prediction, np.uint8))

    samples = [sample("a$_{", (8, 16), 1, 2, BLUE), sample("long" * 30, (16, 8), 0, 0, (250, 250, 0))]
    figures.save_panel(tmp_path / "figures/panel.png", samples, PALETTE, NAMES)
    picture = read(tmp_path / "figures/panel.png")
    for colour, expected in ((BLUE, 2), ((250, 250, 0), 0.5), (PALETTE[1], 2), (PALETTE[2], 2)):
        assert proportions(picture, colour) == pytest.approx(expected, rel=0.03)  # edges on whole pixels
    assert (picture[:12] < 128).any()  # the titles
    figures.save_panel(tmp_path / "none.png", [], PALETTE, NAMES)
    assert not (tmp_path / "none.png").exists()


def test_a_prediction_figure_shows_no_images_and_no_labels(tmp_path):
    image, label = np.full((4, 4, 3), BLUE, np.uint8), np.full((4, 4), 1, np.uint8)
    samples = [Sample("a", image, label, np.full((4, 4), 2, np.uint8))] * 3
    figures.save_predictions(tmp_path / "predictions.png", samples, PALETTE, NAMES)
    picture = read(tmp_path / "predictions.png").astype(int)
    share = [np.all(np.abs(picture - colour) <= 2, axis=-1).mean() for colour in (BLUE, *PALETTE[1:])]
    assert share[0] == share[1] == 0 and 0.6 < share[2] < 0.8  # three of four cells


def test_curves_and_confusion_are_drawn_with_undefined_scores(tmp_path):
    undefined = {"pixel_accuracy": 0.5, "mean_accuracy": None, "mean_iu": None, "frequency_weighted_iu": 0.1}
    rows = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "val", "step": 1, "scores": undefined}]
    figures.save_curves(tmp_path / "curves.png", rows)
    figures.save_curves(tmp_path / "empty.png", [])
    figures.save_confusion(tmp_path / "confusion.png", np.array([[3, 1, 0], [0, 0, 0], [0, 0, 1]]), NAMES)
    figures.save_class_scores(tmp_path / "classes.png", NAMES, {"IoU": np.array([0.5, np.nan, 1])})
    for name in ("curves", "empty", "confusion", "classes"):
        assert cv2.imread(str(tmp_path / f"{name}.png")) is not None


def test_a_score_table_is_in_per_cent_with_two_decimals():
    # Truth: 3 pixels of class 0 and 1 of class 1. One pixel of class 0 is predicted as class 1. Class 2 is absent.
    table = score_table(scores(np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0]])), NAMES, "step 3, [val]")
    console = Console(width=60, file=io.StringIO())
    console.print(table)
    lines = [line.split("│") for line in console.file.getvalue().splitlines()]
    cells = {line[1].strip(): line[2].strip() for line in lines if len(line) > 2}
    means = ("pixel accuracy", "mean accuracy", "mean IoU", "frequency weighted IoU", "mean Dice")
    values = ("75.00", "83.33", "58.33", "62.50", "73.33", "66.67", "50.00", "-")  # Dice 4/5 and 2/3
    assert cells == dict(zip((*means, *(f"IoU {name}" for name in NAMES)), values, strict=True))
