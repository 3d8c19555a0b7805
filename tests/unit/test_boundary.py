import numpy as np
import pytest
from scipy.ndimage import distance_transform_cdt

from fcn_jax.evaluation.boundary import boundary_counts, boundary_iou


def test_boundary_counts_of_a_square_shifted_by_one_pixel():
    labels, predictions = np.zeros((2, 8, 8), np.uint8)
    labels[1:5, 1:5] = 1
    predictions[1:5, 2:6] = 1
    # The regions of class 1 are rings of 12 pixels. Their top and bottom rows share 3 pixels each. Apart from the
    # corners, the columns of one ring lie in the interior of the other.
    counts = boundary_counts(labels, predictions, 2, 1)
    assert counts[:, 1].tolist() == [6, 18]
    assert boundary_counts(labels, labels, 3, 1)[:, 1].tolist() == [12, 12]
    assert boundary_counts(labels, labels, 3, 2)[:, 1].tolist() == [16, 16]  # the whole square
    np.testing.assert_array_equal(boundary_iou(boundary_counts(labels, labels, 3, 1)), [1, 1, np.nan])


def test_ignored_pixels_are_not_counted_and_form_no_boundary():
    labels = np.full((7, 7), 255, np.uint8)
    labels[2:5, 2:5] = 0
    predictions = np.zeros((7, 7), np.uint8)
    predictions[:2] = 1  # only ignored pixels
    assert boundary_counts(labels, predictions, 2, 1).tolist() == [[0, 0], [0, 0]]
    predictions[2] = 1  # three labelled pixels: class 1 is wrong there and creates a boundary of class 0
    assert boundary_counts(labels, predictions, 2, 1).tolist() == [[0, 0], [3, 3]]


def region(mask, pixels):
    """Return the pixels near the boundary by their distance, independently of erosion."""
    return mask & (distance_transform_cdt(np.pad(mask, 1), "chessboard")[1:-1, 1:-1] <= pixels)


@pytest.mark.parametrize("pixels", [1, 2, 5])
def test_counts_equal_those_of_a_distance_transform(pixels):
    rng = np.random.default_rng(pixels)
    labels, predictions = rng.integers(0, 3, (2, 6, 8)).repeat(5, axis=1).repeat(4, axis=2)
    expected = [
        (np.sum(a & b), np.sum(a | b))
        for a, b in ((region(labels == index, pixels), region(predictions == index, pixels)) for index in range(3))
    ]
    np.testing.assert_array_equal(boundary_counts(labels, predictions, 3, pixels).T, expected)
