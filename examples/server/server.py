"""A web server for one segmentation model: pictures and words in, masks out, each request with a strategy of its own.

    uvicorn server:app              # lisa-tiny, or the model that TOKENPRUNE_MODEL names

The endpoints are plain functions, so that FastAPI runs them in its thread pool: uploads are read and masks are written
side by side, and `segment` has the requests take turns on the model.
"""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel

import tokenprune as tp
from tokenprune.errors import IncompatibleError, InputError, OptionError, UnknownNameError
from tokenprune.utils.images import to_rgb

LARGEST_UPLOAD = 10 * 2**20  # bytes
ROOM_FOR_WORDS = 2**16  # bytes of a request beside the picture
LARGEST_IMAGE = 50_000_000  # pixels


class Rle(BaseModel):
    """A mask as lengths of runs, row by row, the first of them outside of the mask (it may be 0)."""

    size: tuple[int, int]
    counts: list[int]


class Segmented(BaseModel):
    """The answer of `POST /segment`."""

    masks: list[Rle]
    text: str
    strategy: str | None
    equivalent_tokens: float | None
    image_tokens: int | None


def create_app(model: Any = None) -> FastAPI:
    """The server.

    Args:
        model: what `tokenprune.load` gives; None loads the one that TOKENPRUNE_MODEL names when the server starts.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.model = model or tp.load(os.environ.get("TOKENPRUNE_MODEL", "lisa-tiny"))
        yield

    app = FastAPI(title="tokenprune", version=tp.__version__, lifespan=lifespan)

    @app.exception_handler(tp.TokenPruneError)
    async def refused(request: Request, error: tp.TokenPruneError) -> JSONResponse:
        """Errors of a client are reported with tokenprune's message; other errors are a 500."""
        return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status_of(error))

    @app.exception_handler(RequestValidationError)
    async def incomplete(request: Request, error: RequestValidationError) -> JSONResponse:
        """So is a field that is missing, or of another type."""
        return JSONResponse({"error": "InputError", "detail": "; ".join(map(problem_of, error.errors()))}, 422)

    @app.middleware("http")
    async def limited(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse what is too large by what it says of itself, before it is read."""
        length = request.headers.get("content-length")
        if request.method == "POST" and (length is None or not length.isdecimal()):
            return JSONResponse({"detail": "the request does not say its length (Content-Length)"}, 411)
        if length is not None and int(length) > LARGEST_UPLOAD + ROOM_FOR_WORDS:
            return JSONResponse({"detail": f"more than {LARGEST_UPLOAD} bytes; send a smaller picture"}, 413)
        return await answer(request)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": app.state.model.name}

    @app.get("/strategies")
    def strategies() -> dict[str, str]:
        """The installed strategies, with what they do."""
        return {name: entry.summary for name, entry in tp.strategies().items()}

    @app.post("/segment", response_model=Segmented, responses={200: {"content": {"image/png": {}}}})
    def segment(
        image: Annotated[UploadFile, File(description="a picture, 10 MiB at most")],
        query: Annotated[str, Form(description="in words, what to segment")],
        strategy: Annotated[str | None, Form(description="a name of /strategies; none by default")] = None,
        budget: Annotated[float | None, Form(description="equivalent image tokens as a share of all")] = None,
        output: Annotated[Literal["rle", "png"], Form(description="JSON, or a picture of the mask")] = "rle",
    ) -> Any:
        chosen = None if strategy is None else tp.strategy(strategy, budget=budget)
        if chosen is None and budget is not None:
            raise HTTPException(422, f"budget={budget} was given without a strategy; name one of /strategies")
        result = app.state.model.segment(picture(image), query, chosen)
        masks = result.masks.cpu().numpy()
        if output == "png":
            return Response(as_png(masks[0]), media_type="image/png")
        ledger = None if result.trace is None else result.trace.ledger
        return Segmented(
            masks=[as_rle(mask) for mask in masks],
            text=result.text,
            strategy=None if chosen is None else repr(chosen),
            equivalent_tokens=None if ledger is None else ledger.equivalent_tokens,
            image_tokens=None if ledger is None else ledger.image_tokens[0],
        )

    return app


def status_of(error: tp.TokenPruneError) -> int:
    """404 for unknown names, 422 for invalid values, 500 for everything that is not the client's error."""
    if isinstance(error, UnknownNameError):
        return 404
    return 422 if isinstance(error, (InputError, OptionError, IncompatibleError)) else 500


def problem_of(found: dict[str, Any]) -> str:
    """One of FastAPI's findings about a request's fields, in a sentence."""
    field = ".".join(map(str, found["loc"][1:]))
    if found["type"] == "missing":
        return f"field {field!r} is missing; give it a value"
    return f"field {field!r}: {found.get('input')!r} found; {found['msg']}"


def picture(upload: UploadFile) -> Image.Image:
    """The uploaded picture. Refuses what is too large before it is decoded."""
    try:
        opened = Image.open(upload.file)
        if opened.width * opened.height > LARGEST_IMAGE:
            raise HTTPException(413, f"the picture has more than {LARGEST_IMAGE} pixels; send a smaller one")
        opened.load()
        return to_rgb(opened, name=f"picture {upload.filename!r}")
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"{upload.filename!r} is no picture that can be read; send a PNG or JPEG") from error


def as_rle(mask: np.ndarray) -> Rle:
    """Of one mask, bool [H, W]."""
    flat = np.concatenate(([False], mask.ravel()))
    edges = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate(([0], edges, [mask.size])))
    return Rle(size=mask.shape, counts=runs.tolist())


def as_png(mask: np.ndarray) -> bytes:
    """One mask, bool [H, W], black and white."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


app = create_app()
