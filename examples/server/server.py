"""A web server for one segmentation model: pictures and words in, masks out, each request with a strategy of its own.

    uvicorn server:app              # lisa-tiny, or the model that TOKENPRUNE_MODEL names

`segment` is a plain function, so that FastAPI runs it in its thread pool: uploads are read and masks are written side
by side, and the model runs the requests that wait as batches, see `batching`.
"""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from batching import Batches, ClosedError
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
LARGEST_BATCH = 8  # requests that run together
LARGEST_BATCH_OF_CPU = 2  # where more would take as long, and all wait for the last one
MOST_REQUESTS = 32  # that are read, wait or run, which is fewer than FastAPI has threads
REMEMBERED = 16  # images after the towers


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


def create_app(model: Any = None, largest_batch: int | None = None) -> FastAPI:
    """The server.

    Args:
        model: what `tokenprune.load` gives; None loads the one that TOKENPRUNE_MODEL names when the server starts.
        largest_batch: requests that run together; 1 runs them one at a time. None = 8, or 2 on a CPU.
    """
    inside = 0  # requests to segment; only the event loop reads and writes it

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.model = model or tp.load(os.environ.get("TOKENPRUNE_MODEL", "lisa-tiny"))
        app.state.model.image_cache.size = max(app.state.model.image_cache.size, REMEMBERED)
        on_cpu = next(app.state.model.parameters()).device.type == "cpu"
        usual = LARGEST_BATCH_OF_CPU if on_cpu else LARGEST_BATCH
        app.state.batches = Batches(app.state.model, largest_batch or usual)
        try:
            yield
        finally:
            app.state.batches.close()

    app = FastAPI(title="tokenprune", version=tp.__version__, lifespan=lifespan)

    @app.exception_handler(tp.TokenPruneError)
    async def refused(request: Request, error: tp.TokenPruneError) -> JSONResponse:
        """Errors of a client are reported with tokenprune's message; other errors are a 500."""
        return JSONResponse({"error": type(error).__name__, "detail": str(error)}, status_of(error))

    @app.exception_handler(RequestValidationError)
    async def incomplete(request: Request, error: RequestValidationError) -> JSONResponse:
        """So is a field that is missing, or of another type."""
        return JSONResponse({"error": "InputError", "detail": "; ".join(map(problem_of, error.errors()))}, 422)

    @app.exception_handler(ClosedError)
    async def stopping(request: Request, error: ClosedError) -> JSONResponse:
        return JSONResponse({"detail": "the server stops; ask another one"}, 503)

    @app.middleware("http")
    async def limited(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse what is too large by what it says of itself, and what is too much, before it is read."""
        nonlocal inside
        length = request.headers.get("content-length")
        if request.method == "POST" and (length is None or not length.isdecimal()):
            return JSONResponse({"detail": "the request does not say its length (Content-Length)"}, 411)
        if length is not None and int(length) > LARGEST_UPLOAD + ROOM_FOR_WORDS:
            return JSONResponse({"detail": f"more than {LARGEST_UPLOAD} bytes; send a smaller picture"}, 413)
        if request.method != "POST":
            return await answer(request)
        if inside >= MOST_REQUESTS:
            detail = f"{inside} requests are being answered; try again in a second"
            return JSONResponse({"detail": detail}, 503, {"Retry-After": "1"})
        inside += 1
        try:
            return await answer(request)
        finally:
            inside -= 1

    @app.get("/health")
    async def health() -> dict[str, str]:
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
        chosen = None if strategy is None else strategy_of(strategy, budget)
        if chosen is None and budget is not None:
            raise HTTPException(422, f"budget={budget} was given without a strategy; name one of /strategies")
        result = app.state.batches.segment(picture(image), query, chosen)
        masks = result.masks.cpu().numpy()
        if output == "png":
            return Response(as_png(masks[0]), media_type="image/png")
        ledger, row = None if result.trace is None else result.trace.ledger, result.prompt_rows[0]
        entered = [] if ledger is None else [layer.image[row] for layer in ledger.entries]
        return Segmented(
            masks=[as_rle(mask) for mask in masks],
            text=result.text,
            strategy=None if chosen is None else repr(chosen),
            equivalent_tokens=sum(entered) / len(entered) if entered else None,
            image_tokens=None if ledger is None else ledger.image_tokens[row],
        )

    return app


@lru_cache(maxsize=256)
def strategy_of(name: str, budget: float | None) -> tp.Strategy:
    """The strategy of a request; equal ones are one object, so that they run together."""
    return tp.strategy(name, budget=budget)


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
