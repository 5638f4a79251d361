"""What may stand for an image: upright, of the right brightness, or refused by name."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_segmentation import FakeModel
from lisa_checkpoints import write_lisa
from numpy.typing import NDArray
from PIL import Image
from vlm_checkpoints import LOADED, write_vlm
from vlm_families import CURRENT

import tokenprune as tp
from tokenprune.errors import InputError
from tokenprune.evaluation.samples import run_single
from tokenprune.utils.images import to_rgb

HEIGHT, WIDTH = 24, 40
ORIENTATION = 0x0112
# How a picture is stored that shows `upright` under each orientation of the EXIF standard, written with numpy alone.
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.fixture(scope="module")
def upright() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def stored(upright: NDArray[Any], orientation: int, path: Path) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(path, exif=exif, **lossless)
    return path


needs_tiny_processors = pytest.mark.skipif(
    not CURRENT, reason="the tiny processors are those of transformers 5.20 and later"
)


def same(found: Image.Image, wanted: NDArray[Any]) -> bool:
    return found.mode == "RGB" and np.array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_from_every_source(
    upright: NDArray[np.uint8], tmp_path: Path, orientation: int, suffix: str
) -> None:
    path = stored(upright, orientation, tmp_path / f"photo.{suffix}")
    lazy, loaded = Image.open(path), Image.open(path)
    loaded.load()
    for source in (path, str(path), lazy, loaded, loaded.convert("RGBA")):
        assert same(to_rgb(source), upright)
        assert same(to_rgb(source), upright)  # nothing of the source was changed
    assert same(to_rgb(to_rgb(path)), upright)


def test_greys_are_turned_too(tmp_path: Path) -> None:
    upright = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 68
    wanted = np.round(upright / 257.0).astype(np.uint8)
    for values in (upright, wanted):  # of 8 bits too: PIL maps uncompressed greys, and a TIFF's are scrambled then
        for suffix in ("png", "tif"):
            path = stored(values, 6, tmp_path / f"scan.{suffix}")
            for source in (path, Image.open(path)):
                assert same(to_rgb(source), np.stack([wanted] * 3, -1))


def test_an_exif_block_that_is_damaged_tells_no_orientation(upright: NDArray[np.uint8]) -> None:
    picture = Image.fromarray(upright)
    picture.info["exif"] = b"garbage"
    assert same(to_rgb(picture), upright)


def test_masks_and_overlays_are_in_the_upright_frame(upright: NDArray[np.uint8], tmp_path: Path) -> None:
    path = stored(upright, 6, tmp_path / "photo.png")
    model = tp.load(write_lisa(tmp_path / "lisa"))
    wanted = model.segment(upright, "the cat").mask_logits
    for source in (path, Image.open(path)):
        assert torch.equal(model.segment(source, "the cat").mask_logits, wanted)
        for other in (model, FakeModel()):
            record = run_single(other, source, "the cat")
            assert np.array_equal(record.image, upright)
            assert record.outcomes[0].mask.shape == (HEIGHT, WIDTH)


@needs_tiny_processors
def test_answers_are_about_the_upright_picture(upright: NDArray[np.uint8], tmp_path: Path) -> None:
    path = stored(upright, 6, tmp_path / "photo.png")
    vlm = tp.load(write_vlm(tmp_path / "llava", "llava"))
    pixels = vlm.inputs(upright, "What?")["pixel_values"]
    assert torch.equal(vlm.inputs(Image.open(path), "What?")["pixel_values"], pixels)


def test_overlays_of_floats_and_tensors_show_the_picture(upright: NDArray[np.uint8]) -> None:
    for source in (upright / 255.0, torch.from_numpy(upright).permute(2, 0, 1)):
        assert np.array_equal(run_single(FakeModel(), source, "the cat").image, upright)


def ramp(top: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """All brightnesses from 0 to `top`, and their 8 bits by rational arithmetic."""
    values = np.linspace(0, top, HEIGHT * WIDTH).astype(np.int64).reshape(HEIGHT, WIDTH)
    wanted = (values * 255 * 2 + top) // (2 * top)
    return values, np.stack([wanted.astype(np.uint8)] * 3, -1)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "pgm of 10 bits", "I;16", "I;16B", "I;16L", "tif of 12 bits"])
def test_greys_of_many_bits_are_scaled_by_their_range(tmp_path: Path, kind: str) -> None:
    top = {"pgm of 10 bits": 1023, "tif of 12 bits": 4095}.get(kind, 65535)
    values, wanted = ramp(top)
    path = tmp_path / f"grey.{kind[:3]}"
    if kind in ("png", "tif"):
        Image.fromarray(values.astype(np.uint16)).save(path)
    elif kind.startswith("pgm"):
        path.write_bytes(f"P5\n{WIDTH} {HEIGHT}\n{top}\n".encode() + values.astype(">u2").tobytes())
    elif kind == "tif of 12 bits":
        path.write_bytes(tiff(values, bits=12))
    else:
        order = ">u2" if kind == "I;16B" else "<u2"
        picture = Image.frombytes(kind, (WIDTH, HEIGHT), values.astype(order).tobytes())
        assert same(to_rgb(picture), wanted)
        return
    assert same(to_rgb(path), wanted)
    assert same(to_rgb(Image.open(path)), wanted)


def test_a_tiff_whose_zero_is_white(tmp_path: Path) -> None:
    values, wanted = ramp(65535)
    (tmp_path / "negative.tif").write_bytes(tiff(65535 - values, bits=16, photometric=0))
    assert same(to_rgb(tmp_path / "negative.tif"), wanted)


def tiff(values: NDArray[np.int64], bits: int, photometric: int = 1) -> bytes:
    """An uncompressed grey TIFF, written by hand: PIL writes none of 12 bits."""
    if bits == 16:
        data = values.astype("<u2").tobytes()
    else:
        pairs = values.reshape(-1, 2)
        first, second = pairs[:, 0], pairs[:, 1]
        packed = np.stack([first >> 4, ((first & 15) << 4) | (second >> 8), second & 255], -1)
        data = packed.astype(np.uint8).tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 277: 1, 278: HEIGHT, 279: len(data)}
    offset = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted({**tags, 273: offset}.items())]
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(entries) + bytes(4) + data


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_whose_white_is_not_known_are_refused(upright: NDArray[np.uint8], tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(upright).convert(mode)
    picture.save(tmp_path / "data.tif")
    for source in (picture, tmp_path / "data.tif", Image.open(tmp_path / "data.tif")):
        with pytest.raises(InputError, match=rf"has the mode '{mode}'.* give an array of floats"):
            to_rgb(source)


def test_modes_of_eight_bits(upright: NDArray[np.uint8]) -> None:
    picture = Image.fromarray(upright)
    grey = np.stack([np.asarray(picture.convert("L"))] * 3, -1)
    half = np.full((HEIGHT, WIDTH, 1), 128, np.uint8)
    assert same(to_rgb(picture.convert("L")), grey)
    assert same(to_rgb(picture.convert("LA")), grey)
    assert same(to_rgb(picture.convert("1")), np.stack([np.asarray(picture.convert("1")) * np.uint8(255)] * 3, -1))
    assert same(to_rgb(Image.fromarray(np.concatenate([upright, half], -1))), upright)


@pytest.mark.parametrize("alpha", [None, 3, bytes([0, 255] * 128)])
def test_palettes(alpha: object) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(numbers, "L").copy()
    picture.putpalette(colours.tobytes())
    if alpha is not None:
        picture.info["transparency"] = alpha
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(to_rgb(picture), colours[numbers])
        assert same(to_rgb(picture.convert("PA")), colours[numbers])


def test_a_mode_that_cannot_be_turned_into_rgb_is_named() -> None:
    with pytest.raises(InputError, match="PIL image of mode 'La' cannot be turned into RGB"):
        to_rgb(Image.new("LA", (3, 2)).convert("La"))


def test_the_first_frame_counts_or_the_one_that_is_shown(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (3, 2), (40 * number, 0, 0)) for number in range(3)]
    for name in ("a.gif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        opened = Image.open(tmp_path / name)
        opened.seek(2)
        assert to_rgb(tmp_path / name).getpixel((0, 0)) == (0, 0, 0)
        assert to_rgb(opened).getpixel((0, 0)) == (80, 0, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int64, np.uint64, np.float16, np.float64, ">f4"])
def test_arrays_of_all_number_types(upright: NDArray[np.uint8], dtype: Any) -> None:
    values = upright / 255.0 if np.dtype(dtype).kind == "f" else upright
    assert same(to_rgb(np.asarray(values).astype(dtype)), upright)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.uint16, torch.float16, torch.float64])
def test_tensors_of_all_number_types(upright: NDArray[np.uint8], dtype: torch.dtype) -> None:
    values = torch.from_numpy(upright)
    values = (values / 255.0 if dtype.is_floating_point else values).to(dtype)
    assert same(to_rgb(values), upright)
    assert same(to_rgb(values.permute(2, 0, 1)), upright)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((4, 4, 3), 40000, np.uint16), "uint16 has values 40000…40000, expected 0…255; divide it by the value"),
        (np.full((4, 4), -1, np.int16), "values -1…-1, expected 0…255"),
        (np.full((4, 4), 255.0), "values 255.0…255.0, expected 0…1; divide it by the value of white, such as 255"),
        (np.array([[0.5, np.nan]]), "values nan…nan, expected 0…1"),
        (np.array([[0.5, np.inf]]), "values 0.5…inf, expected 0…1"),
        (np.full((4, 4), 0.5 + 0j), "holds complex numbers, expected integers"),
        (torch.full((3, 4, 5), 0.5 + 0j), "holds complex numbers, expected integers"),
        (np.zeros((4, 4), bool), "holds booleans"),
        (torch.zeros(4, 4, dtype=torch.bool), "holds booleans"),
        (np.full((4, 4), None), "holds values of type object"),
        (np.zeros((3, 8, 9), np.uint8), r"shape \[3, 8, 9\].*\.transpose\(1, 2, 0\)"),
        (np.zeros((1, 8, 9, 3), np.uint8), r"shape \[1, 8, 9, 3\], .*one image at a time"),
        (torch.zeros(3, 9, 3), r"may be \[3, H, W\] or \[H, W, 3\]"),
        (torch.zeros(1, 9, 4), r"may be \[1, H, W\] or \[H, W, 4\]"),
        (np.zeros((), np.uint8), r"shape \[\]"),
        (np.zeros((4, 0, 3), np.uint8), r"shape \[4, 0, 3\]"),
        (torch.zeros(3, 0, 5), r"shape \[0, 5, 3\]"),
        (torch.zeros(3, 8, 9).to_sparse(), "cannot be read"),
        (torch.zeros(3, 8, 9, device="meta"), "cannot be read"),
        (Image.new("RGB", (0, 3)), "size 0×3, expected at least one pixel"),
        ([], "is a list"),
        (3, "is a int"),
        ("", "is a folder"),
        ("a\0b.png", "cannot be read"),
    ],
)
def test_what_is_no_picture(bad: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        to_rgb(bad)
    assert "\n" not in str(caught.value)


def test_damaged_files_and_closed_images(upright: NDArray[np.uint8], tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp"):
        path = tmp_path / f"photo.{suffix}"
        Image.fromarray(upright).save(path)
        closed = Image.open(path)
        closed.close()
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        for source in (cut, closed):
            with pytest.raises(InputError, match="image"):
                to_rgb(source)
        try:
            lazy = Image.open(cut)
        except OSError:  # some formats notice it here
            continue
        with pytest.raises(InputError, match="cannot be read"):
            to_rgb(lazy)


def test_decompression_bombs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"bomb\.png' may be a decompression bomb: .*MAX_IMAGE_PIXELS"):
        to_rgb(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 9), (9, 3), (3, 3), (1, 3)])
def test_tiny_pictures_keep_their_axes(tmp_path: Path, size: tuple[int, int]) -> None:
    """Three rows of pixels are no three channels."""
    values = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    lisa = tp.load(write_lisa(tmp_path / "lisa"))
    assert lisa.segment(values, "the cat").masks.shape == (1, *size)
    height, width = (32 * side // min(size) for side in size)
    enlarged = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 32) // 2, (width - 32) // 2
    wanted = torch.from_numpy(enlarged[top : top + 32, left : left + 32].copy())
    assert torch.equal(lisa.clip_pixels.picture(lisa.prepare_image(values).clip_pixels)[0], wanted)


@needs_tiny_processors
@pytest.mark.parametrize("name", LOADED)
def test_tiny_pictures_are_taken_or_refused_by_name(tmp_path: Path, name: str) -> None:
    model = tp.load(write_vlm(tmp_path / name, name))
    for size in [(1, 1), (3, 9), (1, 900)]:
        values = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
        try:
            assert model.answer(values, "What?", max_new_tokens=1).text is not None
        except InputError as error:
            assert f"{size[1]}×{size[0]}" in str(error)  # noqa: PT017 - one or the other


def test_a_folder_is_no_picture_and_errors_call_a_pil_image_as_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder, expected an image file; check the path"):
        to_rgb(tmp_path)
    with pytest.raises(InputError, match=r"^upload 'a\.tif' has the mode 'F'"):
        to_rgb(Image.new("F", (4, 4)), name="upload 'a.tif'")


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_nested_tensors_are_refused() -> None:
    with pytest.raises(InputError, match=r"has no shape .*; give one image"):
        to_rgb(torch.nested.nested_tensor([torch.zeros(3, 4), torch.zeros(2, 4)]))


@pytest.mark.parametrize(
    ("values", "cure"),
    [
        (np.full((4, 4, 3), -1, np.int8), "undo what moved its values below 0"),
        (np.full((4, 4, 3), -0.5), "undo what moved its values below 0"),
        (np.full((4, 4, 3), np.nan), "replace values that are not finite"),
        (np.full((4, 4, 3), 4095, np.uint16), "divide it by the value of white, such as 65535"),
        (np.full((4, 4, 3), 7.0), "divide it by the value of white, such as 255"),
    ],
)
def test_the_cure_is_for_what_is_wrong(values: Any, cure: str) -> None:
    for image in (values, torch.from_numpy(values)):
        with pytest.raises(InputError, match=cure):
            to_rgb(image)


@pytest.mark.parametrize("kind", [str, Path])
def test_urls_are_told_as_such(kind: Any) -> None:
    with pytest.raises(InputError, match=r"^image 'http://a/b\.png\?x=1' is a URL, which is not fetched; download it"):
        to_rgb(kind("http://a/b.png?x=1"))
