"""What one server takes on: the options of `tokenprune serve` that are numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenprune.errors import OptionError
from tokenprune.utils.arguments import shown, whole_number
from tokenprune.utils.extras import check_modules

NEEDED = ("fastapi", "prometheus_client", "pycocotools", "python_multipart", "uvicorn")
MEGABYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        queue: complete requests that wait for the model or are run by it.
        batch: requests that run together; None = 8, or 2 on a CPU, where more would take as long.
        upload: bytes of an image.
        pixels: of an image.
        seconds: for an upload, and then for the answer.
    """

    queue: int = 32
    batch: int | None = None
    upload: int = 10 * MEGABYTE
    pixels: int = 25_000_000
    seconds: float = 60.0

    @property
    def body(self) -> int:
        """Bytes of a request: an image, and the fields beside it."""
        return self.upload + 2**16


def limits_of(queue: int, batch: int | None, max_upload_mb: float, max_pixels: int, timeout: float) -> Limits:
    """Limits from the options of the command.

    Raises:
        OptionError: one is out of range.
    """
    from PIL import Image

    for name, value in (("--max-upload-mb", max_upload_mb), ("--timeout", timeout)):
        if not 0 < value < math.inf:
            raise OptionError(f"{name}: {shown(value)} found, expected a number above 0")
    most = Image.MAX_IMAGE_PIXELS or math.inf
    if whole_number("--max-pixels", max_pixels, 1) > most:
        raise OptionError(
            f"--max-pixels: {max_pixels} found, expected at most {most}: Pillow takes more for a decompression bomb"
        )
    return Limits(
        queue=whole_number("--queue", queue, 1),
        batch=None if batch is None else whole_number("--batch", batch, 1),
        upload=max(1, int(max_upload_mb * MEGABYTE)),
        pixels=max_pixels,
        seconds=timeout,
    )


def check_installed() -> None:
    """Check before any work that there can be a server; nothing is imported.

    Raises:
        UnsupportedError: a package is missing.
    """
    check_modules("a server", NEEDED, "serve")
