"""From the bytes of an upload to a picture; what is no picture, or too large a one, is refused before it is decoded."""

from __future__ import annotations

import io

from fastapi import HTTPException
from PIL import Image, UnidentifiedImageError

from tokenprune.utils.images import to_rgb

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Others are not even tried: some of Pillow's readers start programs (EPS) or are hardly tested."""
SCANS = 100
"""Of a JPEG: progressive ones have about ten, and each can cost a pass over all pixels for a few bytes."""


def read_picture(data: bytes, pixels: int) -> Image.Image:
    """The picture in RGB, upright by EXIF.

    Args:
        data: the file.
        pixels: the most that it may have.

    Raises:
        HTTPException: 415 for what is no picture of a known format, 413 for one of too many pixels, 422 for a damaged
            one.
        InputError: a damaged one, or one of unknown range.
    """
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise HTTPException(415, f"image: no picture found; send {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except Image.DecompressionBombError:
        raise too_many(pixels) from None
    except Exception as error:  # what Pillow raises on a damaged file differs from format to format
        raise damaged() from error
    if opened.width * opened.height > pixels:
        raise too_many(pixels)
    # In compressed data a 0xff is followed by 0x00, so that these two bytes begin a scan.
    if opened.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > SCANS:
        raise damaged(f" (a JPEG of more than {SCANS} scans)")
    return to_rgb(opened, name="image")


def too_many(pixels: int) -> HTTPException:
    """For a picture of too many pixels."""
    return HTTPException(413, f"image: more than {pixels} pixels; send a smaller one")


def damaged(why: str = "") -> HTTPException:
    """For a picture that cannot be read."""
    return HTTPException(422, f"image: damaged{why}; send an intact one")
