import jax
import numpy as np
import pytest
import torch
import torchvision_import  # noqa: F401  (before torchmetrics, which imports torchvision)
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fcn_jax import metrics


def test_scores_by_hand():
    # Rows are the truth: class 0 has 4 pixels (3 hit), class 1 has 2 (1 hit), class 2 has 2 (2 hit)
    confusion = np.array([[3, 1, 0], [0, 1, 1], [0, 0, 2]])
    scores = metrics.scores(confusion)
    # Rounding of a few operations in float64.
    np.testing.assert_allclose(scores.per_class_iu, [3 / 4, 1 / 3, 2 / 3], rtol=1e-15)
    assert scores.pixel_accuracy == pytest.approx(6 / 8, rel=1e-15)
    assert scores.mean_accuracy == pytest.approx((3 / 4 + 1 / 2 + 1) / 3, rel=1e-15)
    assert scores.mean_iu == pytest.approx((3 / 4 + 1 / 3 + 2 / 3) / 3, rel=1e-15)
    assert scores.frequency_weighted_iu == pytest.approx((4 * 3 / 4 + 2 / 3 + 2 * 2 / 3) / 8, rel=1e-15)


def test_an_absent_class_is_nan_and_excluded_from_the_means():
    scores = metrics.scores(np.array([[4, 0, 0], [0, 2, 0], [0, 0, 0]]))
    assert np.isnan(scores.per_class_iu[2])
    assert scores.mean_iu == scores.mean_accuracy == scores.frequency_weighted_iu == 1.0


def test_a_class_only_in_predictions_has_iu_zero_and_counts_in_the_mean():
    scores = metrics.scores(np.array([[3, 1], [0, 0]]))
    np.testing.assert_array_equal(scores.per_class_iu, [0.75, 0.0])
    assert scores.mean_iu == 0.375
    assert scores.mean_accuracy == 0.75  # over classes that occur in the labels


def test_scores_without_pixels_are_nan_and_null_in_json():
    scores = metrics.scores(np.zeros((2, 2), np.int64))
    assert np.isnan(scores.mean_iu) and np.isnan(scores.pixel_accuracy)
    assert scores.to_json()["mean_iu"] is None and scores.to_json()["per_class_iu"] == [None, None]


def test_confusion_counts_by_truth_then_prediction_and_skips_ignored_pixels():
    labels = np.array([[0, 1, 255], [1, 0, 255]], np.uint8)
    predictions = np.array([[1, 1, 0], [0, 0, 7]], np.uint8)  # 7 is not a class, but its label is ignored
    confusion = metrics.confusion_matrix(labels, predictions, 2)
    np.testing.assert_array_equal(confusion, [[1, 1], [1, 1]])
    assert confusion.dtype == np.int64


def test_confusion_within_jit_does_not_count_values_out_of_range():
    labels, predictions = np.array([0, 0, 1, 2, 255, 9]), np.array([1, 1, 0, 7, 0, 0])
    traced = jax.jit(lambda a, b: metrics.confusion_matrix(a, b, 3))(labels, predictions)
    np.testing.assert_array_equal(traced, [[0, 2, 0], [1, 0, 0], [0, 0, 0]])


def test_counts_beyond_32_bits_add_up():
    big = np.array([[2**33, 1], [0, 2**33]], np.int64)
    assert metrics.scores(big + big).pixel_accuracy == pytest.approx(1 - 2 / 2**35, rel=1e-15)


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [((0, bad), (0, 0), f"got {bad}") for bad in (3, 200, -1)]
    + [((0, 0), (0, bad), f"prediction.*got {bad}") for bad in (3, 200, -1)]
    + [((0, 1), (0.9, 0.1), "argmax"), (((0, 0), (0, 0)), (0, 0, 0, 0), "the same shape")],
)
def test_invalid_labels_and_predictions_are_rejected(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        metrics.confusion_matrix(np.array(labels), np.array(predictions), 3)


@pytest.fixture(params=[0, 1, 2])
def masks(request):
    rng = np.random.default_rng(request.param)
    labels = rng.integers(0, 5, (4, 9, 11))
    predictions = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 5, labels.shape))
    labels[rng.random(labels.shape) < 0.1] = 255
    return labels, predictions


def test_random_masks_agree_with_torchmetrics(masks):
    labels, predictions = (torch.from_numpy(x) for x in masks)
    scores = metrics.scores(metrics.confusion_matrix(*masks, 5))
    # torchmetrics computes in float32, with rounding errors of up to 1e-6.
    expected = MulticlassJaccardIndex(5, average=None, ignore_index=255)(predictions, labels)
    np.testing.assert_allclose(scores.per_class_iu, expected.numpy(), rtol=1e-6)
    for average, ours in (("macro", scores.mean_iu), ("weighted", scores.frequency_weighted_iu)):
        theirs = MulticlassJaccardIndex(5, average=average, ignore_index=255)(predictions, labels)
        assert ours == pytest.approx(theirs.item(), rel=1e-6)
    for average, ours in (("micro", scores.pixel_accuracy), ("macro", scores.mean_accuracy)):
        theirs = MulticlassAccuracy(5, average=average, ignore_index=255)(predictions, labels)
        assert ours == pytest.approx(theirs.item(), rel=1e-6)
