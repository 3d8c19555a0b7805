import io

import cv2
import numpy as np
import pytest
import trees
from PIL import Image

from fcn_jax.data.labels import (
    CAMVID_CLASSES,
    CAMVID_PALETTE,
    VOC_CLASSES,
    check_label,
    check_pair,
    decode_image,
    decode_label,
    encode_label,
    palette_for,
    voc_palette,
)
from fcn_jax.errors import InputError


def _saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def test_voc_colour_map_has_the_published_colours():
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert [tuple(c) for c in voc_palette(5).tolist()] == expected
    assert voc_palette()[20].tolist() == [0, 64, 128]  # tvmonitor
    assert voc_palette()[255].tolist() == [224, 224, 192]  # the void border
    assert len({tuple(c) for c in voc_palette().tolist()}) == 256
    assert palette_for(2) == ((0, 0, 0), (128, 0, 0))


def test_class_lists_have_their_lengths_and_colours():
    assert len(VOC_CLASSES) == 21 and VOC_CLASSES[15] == "person"
    assert len(CAMVID_CLASSES) == len(CAMVID_PALETTE) == len(set(CAMVID_PALETTE)) == 11


def test_an_image_is_decoded_as_rgb():
    image = trees.picture(0)
    assert np.array_equal(decode_image(_png(image[..., ::-1]), "x"), image)


def test_a_grey_image_is_repeated_over_the_channels():
    grey = trees.picture(0)[..., 0]
    assert np.array_equal(decode_image(_png(grey), "x"), np.repeat(grey[..., None], 3, axis=2))


def test_alpha_is_dropped_not_blended():
    image = np.dstack([trees.picture(0), np.zeros((12, 16), np.uint8)])
    assert np.array_equal(decode_image(_saved(Image.fromarray(image)), "x"), image[..., :3])


def test_sixteen_bit_samples_keep_their_upper_byte():
    samples = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    assert decode_image(_png(samples), "x")[0, :, 0].tolist() == [0, 0, 1, 156, 255]
    colour = np.dstack([samples, samples // 2, samples // 4])
    assert decode_image(_png(colour), "x")[0, 3].tolist() == [10000 >> 8, 20000 >> 8, 40000 >> 8]


def test_a_palette_image_gives_its_colours():
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(_saved(image), "x").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_exif_orientation_is_applied():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    turned = decode_image(_saved(Image.fromarray(image), "JPEG", exif=exif, quality=95), "x")
    assert turned.shape == (32, 16, 3)
    assert turned[:14].min() > 200 and turned[18:].max() < 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.97])
def test_a_file_cut_short_is_refused_by_name(kind, keep):
    data = _saved(Image.fromarray(trees.picture(0, (64, 64))), kind)
    data = data[: int(keep * len(data)) if isinstance(keep, float) else keep]
    with pytest.raises(InputError, match=r"bad\.xyz: not a readable image"):
        decode_image(data, "bad.xyz")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_cut_short_is_refused_though_opencv_returns_a_picture(kind, monkeypatch):
    whole = _saved(Image.fromarray(trees.picture(0, (64, 64))), kind)
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: np.zeros((64, 64, 3), np.uint8))  # as OpenCV 4 does
    assert decode_image(whole + b"and more behind it", "x").shape == (64, 64, 3)
    with pytest.raises(InputError, match="not a readable image"):
        decode_image(whole[:-10], "x")


def test_text_is_neither_image_nor_mask():
    with pytest.raises(InputError, match=r"a\.png: not a readable image"):
        decode_image(b"not an image", "a.png")
    with pytest.raises(InputError, match=r"a\.png: not a readable mask"):
        decode_label(b"not an image", "a.png")


def test_a_palette_mask_gives_its_indices(tmp_path):
    label = trees.mask(0, 21)
    trees.write_palette_mask(tmp_path / "a.png", label)
    data = (tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
    assert np.array_equal(decode_label(data, "a"), label)
    assert not np.array_equal(decode_image(data, "a")[..., 0], label)  # what OpenCV alone would give


def test_a_palette_mask_of_two_bits_gives_its_indices():
    label = np.array([[0, 1, 2, 3, 1]], np.uint8)
    image = Image.fromarray(label).convert("P")
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6])
    data = _saved(image, bits=2)
    assert data[24:26] == b"\x02\x03"
    assert decode_label(data, "a").tolist() == label.tolist()


def test_grey_masks_give_their_samples():
    label = trees.mask(0, 5)
    assert np.array_equal(decode_label(_png(label), "a"), label)
    assert np.array_equal(decode_label(encode_label(label), "a"), label)
    assert np.array_equal(decode_label(_png(label.astype(np.uint16)), "a"), label)
    assert np.array_equal(decode_label(_saved(Image.fromarray(label), "BMP"), "a"), label)


def test_a_grey_mask_of_one_bit_gives_zeros_and_ones():
    bits = np.array([[0, 1], [1, 0]], bool)
    data = _saved(Image.fromarray(bits))
    assert data[24:26] == b"\x01\x00"
    assert decode_label(data, "a").tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_mask_with_colour_channels_is_refused(mode):
    with pytest.raises(InputError, match=r"a\.png: a mask with colour channels; .* save as 8-bit PNG"):
        decode_label(_saved(Image.new(mode, (3, 2))), "a.png")


def test_a_jpeg_mask_is_refused():
    with pytest.raises(InputError, match=r"a\.jpg: a JPEG mask has no exact class ids"):
        decode_label(_saved(Image.new("L", (8, 8)), "JPEG"), "a.jpg")


def test_a_sixteen_bit_mask_with_large_values_is_refused():
    with pytest.raises(InputError, match=r"a\.png: mask value 300 does not fit"):
        decode_label(_png(np.full((2, 2), 300, np.uint16)), "a.png")


def test_undeclared_class_ids_are_named():
    check_label(np.array([[0, 2, 255]], np.uint8), 3, "a.png")
    with pytest.raises(
        InputError, match=r"a\.png: class ids 3, 254 are not among the 3 classes \(0\.\.2, 255 = ignore\)"
    ):
        check_label(np.array([[0, 3, 254, 255]], np.uint8), 3, "a.png")


def test_sizes_that_differ_are_named():
    with pytest.raises(InputError, match=r"a\.png: the image is 16 x 12 pixels, its mask 12 x 16"):
        check_pair(trees.picture(0), np.zeros((16, 12), np.uint8), "a.png")
