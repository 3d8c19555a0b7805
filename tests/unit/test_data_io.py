import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import trees
from PIL import Image

from fcn_jax.data import camvid, voc
from fcn_jax.data.io import decode_image, decode_label, encode_label, palette
from fcn_jax.data.prepared import check_example
from fcn_jax.errors import InputError, UnreadableError
from fcn_jax.paths import to_path


def _saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def _raw_png(size, bits, rows):
    """A grey PNG of any depth whose header may claim any size (width, height)."""
    header = b"IHDR" + struct.pack(">IIBBBBB", *size, bits, 0, 0, 0, 0)
    parts = (header, b"IDAT" + zlib.compress(rows), b"IEND")
    packed = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_voc_and_camvid_have_the_published_classes_and_colours():
    colours = palette(256)
    assert colours[:5] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128))
    assert colours[20] == (0, 64, 128)  # tvmonitor
    assert colours[255] == (224, 224, 192)  # the void border
    assert len(set(colours)) == 256
    assert len(voc.CLASSES) == 21 and voc.CLASSES[15] == "person"
    assert len(camvid.CLASSES) == len(camvid.PALETTE) == len(set(camvid.PALETTE)) == 11


def test_images_are_decoded_as_8_bit_rgb():
    image = trees.picture(0)
    assert np.array_equal(decode_image(_png(image[..., ::-1]), "x"), image)
    assert np.array_equal(decode_image(_png(image[..., 0]), "x"), np.repeat(image[..., :1], 3, axis=2))  # grey
    transparent = Image.fromarray(np.dstack([image, np.zeros((12, 16), np.uint8)]))
    assert np.array_equal(decode_image(_saved(transparent), "x"), image)  # alpha is dropped, not blended
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert decode_image(_saved(palette), "x").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_sixteen_bit_samples_keep_their_upper_byte():
    samples = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    assert decode_image(_png(samples), "x")[0, :, 0].tolist() == [0, 0, 1, 156, 255]
    colour = np.dstack([samples, samples // 2, samples // 4])
    assert decode_image(_png(colour), "x")[0, 3].tolist() == [10000 >> 8, 20000 >> 8, 40000 >> 8]


def test_exif_orientation_is_applied():
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation 6: rotate by 90 degrees clockwise to display
    data = _saved(Image.fromarray(image), "JPEG", exif=exif, quality=95)
    for verify in (True, False):
        turned = decode_image(data, "x", verify)
        assert turned.shape == (32, 16, 3)
        assert turned[:14].min() > 200 and turned[18:].max() < 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_truncated_image_is_rejected_although_opencv_decodes_it(kind, monkeypatch):
    whole = _saved(Image.fromarray(trees.picture(0, (64, 64))), kind)
    monkeypatch.setattr(cv2, "imdecode", lambda data, flags: np.zeros((64, 64, 3), np.uint8))  # as OpenCV 4 does
    assert decode_image(whole + b"and more behind it", "x").shape == (64, 64, 3)
    for size in (0, 3, 40, len(whole) // 2, len(whole) * 97 // 100, len(whole) - 40):
        with pytest.raises(UnreadableError, match=r"bad\.xyz: not a readable image"):
            decode_image(whole[:size], "bad.xyz")


def test_text_and_eps_files_are_rejected_as_images():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (b"not an image", postscript):  # Pillow would hand the second to Ghostscript
        for decode, kind in ((decode_image, "image"), (decode_label, "mask")):
            with pytest.raises(
                UnreadableError, match=rf"a\.png: not a readable {kind} \(damaged or of an unsupported type\)"
            ):
                decode(data, "a.png")


def test_an_oversized_image_is_rejected_by_its_header():
    jpeg = bytearray(_saved(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.find(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 30_000, 40_000)
    claims = [_raw_png((side, side), 1, bytes(1000)) for side in (30_000, 2**31 - 1)]
    for data in (*claims, bytes(jpeg)):
        for decode in (decode_image, decode_label):
            with pytest.raises(UnreadableError, match=r"x\.png: not a readable .* \(Image size .* exceeds limit"):
                decode(data, "x.png")


def test_palette_masks_are_decoded_as_indices(tmp_path):
    label = trees.mask(0, 21)
    trees.write_palette_mask(tmp_path / "a.png", label)
    data = (tmp_path / "a.png").read_bytes()
    assert np.array_equal(decode_label(data, "a"), label)
    assert not np.array_equal(decode_image(data, "a")[..., 0], label)  # OpenCV alone returns colours
    image = Image.fromarray(np.array([[0, 1, 2, 3, 1]], np.uint8)).convert("P")
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6, 6])
    for data in (_saved(image, bits=2), _saved(image, "GIF"), _saved(image, "BMP")):
        assert decode_label(data, "a").tolist() == [[0, 1, 2, 3, 1]]


def test_grey_masks_are_decoded_as_their_values():
    label = trees.mask(0, 5)
    for data in (
        _png(label), encode_label(label), _png(label.astype(np.uint16)),
        _saved(Image.fromarray(label), "BMP"), _saved(Image.fromarray(label), "TIFF"),
    ):  # fmt: skip
        assert np.array_equal(decode_label(data, "a"), label)
    assert np.array_equal(decode_label(encode_label(label), "a", verify=False), label)


@pytest.mark.parametrize(("bits", "row"), [(1, b"\x50"), (2, b"\x11"), (4, b"\x01\x01"), (8, b"\x00\x01\x00\x01")])
def test_grey_masks_of_low_bit_depth_are_not_rescaled(bits, row):
    assert decode_label(_raw_png((4, 1), bits, b"\0" + row), "a").tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize(("mode", "color"), [("RGB", (1, 2, 3)), ("RGBA", (1, 2, 3, 4)), ("LA", (1, 2))])
def test_a_mask_with_colour_channels_is_rejected(mode, color):
    with pytest.raises(InputError, match=r"a\.png: a mask with colour channels; .* save as 8-bit PNG"):
        decode_label(_saved(Image.new(mode, (3, 2), color)), "a.png")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mask_of_32_bits_is_rejected(mode):
    with pytest.raises(InputError, match=rf"a\.tif: a mask of 16 or 32 bits, mode {mode}; .* 8-bit PNG"):
        decode_label(_saved(Image.new(mode, (3, 2), 1), "TIFF"), "a.tif")


def test_a_grey_mask_stored_as_rgb_is_read_as_grey():
    assert decode_label(_saved(Image.new("RGB", (3, 2), (7, 7, 7))), "a.png").tolist() == [[7, 7, 7], [7, 7, 7]]


def test_masks_without_exact_class_ids_are_rejected():
    with pytest.raises(InputError, match=r"a\.jpg: a JPEG mask has no exact class ids"):
        decode_label(_saved(Image.new("L", (8, 8)), "JPEG"), "a.jpg")
    with pytest.raises(InputError, match=r"a\.png: mask value 300 does not fit"):
        decode_label(_png(np.full((2, 2), 300, np.uint16)), "a.png")


def test_undeclared_class_ids_and_mismatched_sizes_are_named():
    image = trees.picture(0, (1, 4))
    assert check_example(image, np.array([[0, 2, 2, 255]], np.uint8), 3, "a.png") == {0, 2, 255}
    message = r"a\.png: class ids 3, 254 are not among the 3 classes \(0\.\.2, 255 = ignore\)"
    with pytest.raises(InputError, match=message):
        check_example(image, np.array([[0, 3, 254, 255]], np.uint8), 3, "a.png")
    with pytest.raises(InputError, match=r"a\.png: the image is 4 x 1 pixels, its mask 1 x 4"):
        check_example(image, np.zeros((4, 1), np.uint8), 3, "a.png")


def test_unusable_paths_are_named_with_their_flag():
    for path in ("s3://bucket/set", "file:///set"):
        with pytest.raises(InputError, match=rf"--data\.dir {path}: .* is not supported"):
            to_path(path, "--data.dir")
    for path in ("x" * 300, "~nobody-of-this-name"):
        with pytest.raises(InputError, match=r"--data\.dir '.*': not a usable path"):
            to_path(path, "--data.dir")
