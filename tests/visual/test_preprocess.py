import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from vtrain.settings import Images
from vtrain.visual.preprocess import (
    adm_center_crop,
    center_crop_resize,
    load_image,
    square,
    to_tensor,
    to_uint8,
)


def noise(height, width, mode="RGB", seed=0):
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode)


def resized_and_cropped(image, resolution, resample):
    """The steps of the published tokenizers, with floating point for the longer side."""
    width, height = image.size
    if width <= height:
        size = (resolution, int(resolution * height / width))
    else:
        size = (int(resolution * width / height), resolution)
    pixels = np.asarray(image.convert("RGB").resize(size, resample))
    top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution]


@pytest.mark.parametrize("size", [(17, 40), (40, 17), (33, 33), (65, 16), (100, 37), (31, 1000)])
def test_larger_pictures_are_reduced_with_lanczos_and_cropped(size):
    image = noise(*size)
    expected = resized_and_cropped(image, 16, Image.Resampling.LANCZOS)
    result = center_crop_resize(image, 16, "nearest")
    assert result.shape == (16, 16, 3)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("name", "resample"),
    [
        ("nearest", Image.Resampling.NEAREST),
        ("bicubic", Image.Resampling.BICUBIC),
        ("lanczos", Image.Resampling.LANCZOS),
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (9, 5), (1, 3)])
def test_smaller_pictures_are_enlarged_with_the_chosen_filter(name, resample, size):
    image = noise(*size)
    np.testing.assert_array_equal(center_crop_resize(image, 16, name), resized_and_cropped(image, 16, resample))


def test_a_picture_that_fits_keeps_its_pixels():
    image = noise(8, 11)
    np.testing.assert_array_equal(center_crop_resize(image, 8), np.asarray(image)[:, 1:9])


def test_grey_pictures_become_rgb():
    image = noise(8, 8, "L")
    pixels = center_crop_resize(image, 8)
    assert pixels.shape == (8, 8, 3)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], np.asarray(image))


def test_an_unknown_filter_is_named():
    with pytest.raises(ValueError, match="filter 'box'; expected one of nearest, bicubic, lanczos"):
        center_crop_resize(noise(8, 8), 8, "box")


def test_pixels_survive_the_way_to_a_tensor_and_back():
    pixels = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)[None].repeat(2, 0)
    pixels[1, ..., 0] = 255 - pixels[1, ..., 0]
    tensor = to_tensor(pixels)
    assert tensor.shape == (2, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    assert tensor[1, 0, 0, 1] == pixels[1, 0, 1, 0] / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(tensor), pixels)
    np.testing.assert_array_equal(to_uint8(tensor[1]), pixels[1])


def test_values_outside_are_clipped():
    assert to_uint8(torch.tensor([-7.0, 0.0, 1.3]).reshape(3, 1, 1)).ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)])
def test_other_pixels_are_refused(pixels):
    with pytest.raises(ValueError, match=r"expected uint8 \[\.\.\., H, W, 3\]"):
        to_tensor(pixels)


def test_alpha_is_dropped_not_blended(tmp_path):
    image = noise(6, 5, "RGBA")
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image)[..., :3])


def broken_files(folder):
    noise(64, 64).save(folder / "whole.png")
    noise(64, 64).save(folder / "whole.jpg")
    for suffix in ("png", "jpg"):
        whole = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        (folder / f"header_only.{suffix}").write_bytes(whole[:20])
    flipped = bytearray((folder / "whole.png").read_bytes())
    flipped[200] ^= 0x40
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "text.png").write_text("this is not a picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    Image.new("RGB", (301, 3)).save(folder / "thin.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(folder / "deep.png")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.png", "cannot read"),
        ("cut.jpg", "truncated"),
        ("header_only.png", "cannot read"),
        ("header_only.jpg", "cannot read"),
        ("flipped.png", "cannot read"),
        ("text.png", "cannot identify"),
        ("empty.png", "the file is empty"),
        ("folder.png", "cannot read"),
        ("deep.png", "pixel mode I;16, expected 8 bits"),
        ("thin.png", "301 x 3 pixels, expected sides of at most 100 : 1"),
        ("missing.png", "no such image file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, reason):
    broken_files(tmp_path)
    with pytest.raises(ValueError) as caught:
        load_image(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def adm(image, resolution):
    """The published function, with numpy for the crop."""
    while min(*image.size) >= 2 * resolution:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = resolution / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - resolution) // 2, (pixels.shape[1] - resolution) // 2
    return pixels[top : top + resolution, left : left + resolution]


@pytest.mark.parametrize(
    "size", [(777, 2100), (2100, 777), (64, 64), (63, 200), (128, 128), (127, 129), (1, 3), (50, 64), (255, 513)]
)
def test_adm_crop_equals_the_published_steps(size):
    image = noise(*size)
    result = square(image, 64, "adm", "nearest")
    assert result.shape == (64, 64, 3)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, adm(image, 64))
    np.testing.assert_array_equal(adm_center_crop(image, 64), result)


def test_adm_crop_of_grey():
    image = noise(70, 150, "L")
    np.testing.assert_array_equal(adm_center_crop(image, 32), adm(image.convert("RGB"), 32))


@pytest.mark.parametrize("size", [(40, 17), (17, 9)])
def test_the_key_chooses_the_crop(size):
    image = noise(*size)
    np.testing.assert_array_equal(square(image, 8, "center", "nearest"), center_crop_resize(image, 8, "nearest"))
    assert not np.array_equal(square(image, 8, "adm"), square(image, 8, "center"))
    with pytest.raises(ValueError, match="crop 'random'; expected one of center, adm"):
        square(image, 8, "random")


def test_the_settings_offer_the_same_crops():
    (field,) = [f for f in dataclasses.fields(Images) if f.name == "crop"]
    for crop in field.metadata["choices"]:
        assert square(noise(9, 9), 4, crop).shape == (4, 4, 3)
