"""The routes of a server: `POST /segment` or `POST /answer`, `GET /health`, `GET /strategies`, `GET /metrics`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pycocotools import mask as coco

from tokenprune import __version__
from tokenprune.core.strategy import Strategy
from tokenprune.errors import BudgetError, IncompatibleError, InputError, OptionError, TokenPruneError, UnknownNameError
from tokenprune.evaluation.models import SegmentationModel
from tokenprune.plugins import registry
from tokenprune.serve.batches import Batches, ClosedError, Job
from tokenprune.serve.guard import CLOSED, RETRY, Guard
from tokenprune.serve.limits import Limits
from tokenprune.serve.metrics import CONTENT_TYPE, Metrics
from tokenprune.serve.pictures import read_picture
from tokenprune.serve.strategies import Choices
from tokenprune.serve.work import Done, work_of
from tokenprune.utils.arguments import shown

LOG = logging.getLogger("tokenprune.serve")
OF_CLIENTS = (InputError, OptionError, IncompatibleError, UnknownNameError)
"""Errors that are told; the messages of others may hold paths of this machine."""
FAILED = "the server failed; its log says why"
READERS = 2  # threads that decode pictures and encode masks
REMEMBERED = 16  # images after the towers
LONGEST_QUERY = 8000  # characters
LONGEST_DETAIL = 600
MOST_NEW_TOKENS = 512

Picture = Annotated[UploadFile, File(description="a picture")]
Query = Annotated[str, Form(max_length=LONGEST_QUERY, description="what to segment, or to answer, in words")]
StrategyText = Annotated[str | None, Form(description="of /strategies, as csp or csp:query=seg; else the server's own")]
Budget = Annotated[float | None, Form(description="equivalent image tokens as a share of all")]
NewTokens = Annotated[int, Form(ge=1, le=MOST_NEW_TOKENS, description="limit of the answer")]


class Service:
    """A model, and what runs its requests.

    Args:
        model: a `SegmentationModel` or an `AnsweringModel`.
        choices: the strategies.
        limits: the bounds.
        metrics: the counters.
    """

    def __init__(self, model: Any, choices: Choices, limits: Limits, metrics: Metrics) -> None:
        self._choices, self._limits, self._metrics = choices, limits, metrics
        size = limits.batch or (2 if _on_cpu(model) else 8)
        self._batches = Batches(work_of(model), size, metrics.ran)
        self._readers = ThreadPoolExecutor(READERS, "tokenprune-readers")
        metrics.watch_queue(lambda: len(self._batches))
        if hasattr(model, "image_cache"):
            model.image_cache.size = max(model.image_cache.size, REMEMBERED)

    def close(self) -> None:
        """Finish what waits, and end all threads."""
        self._batches.close()
        self._readers.shutdown()

    async def answer(
        self,
        request: Request,
        image: UploadFile,
        query: str,
        strategy: str | None,
        budget: float | None,
        max_new_tokens: int = 1,
    ) -> dict[str, Any]:
        """Run a request, and describe what came of it. Arguments are the fields of the form.

        Raises:
            HTTPException: 503 if its turn did not come in time, 504 if the model is not done in time.
            ClosedError: the server stops.
            TokenPruneError: something in the request, or in the server.
        """
        job: Job | None = None

        async def run() -> dict[str, Any]:
            nonlocal job
            loop = asyncio.get_running_loop()
            data = await image.read()
            chosen = await loop.run_in_executor(self._readers, self._choices.of, strategy, budget)
            picture = await loop.run_in_executor(self._readers, read_picture, data, self._limits.pixels)
            job = Job(picture, query, chosen, max_new_tokens)
            try:
                done = await asyncio.wrap_future(self._batches.submit(job))
            except (OptionError, IncompatibleError) as error:
                if strategy is None and not isinstance(error, BudgetError):  # of the server's own strategy
                    raise RuntimeError("the server's own strategy cannot run") from error
                raise
            self._metrics.kept(done)
            return await loop.run_in_executor(self._readers, described, done, chosen)

        work, gone = asyncio.ensure_future(run()), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({work, gone}, timeout=self._limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if gone.done():
                raise HTTPException(CLOSED, "the client left")
            if job is not None and job.began.is_set():
                raise HTTPException(504, f"no answer in {self._limits.seconds:g} seconds; ask for less")
            raise HTTPException(503, f"no turn in {self._limits.seconds:g} seconds; try again later", RETRY)
        finally:
            work.cancel()  # what has not begun is not run
            gone.cancel()


def create_app(model: Any, choices: Choices | None = None, limits: Limits | None = None) -> FastAPI:
    """The ASGI application of a server, whose threads live from its start to its end.

    Args:
        model: a `SegmentationModel` or an `AnsweringModel`, as `tokenprune.load` gives.
        choices: the strategies; by default requests without one are not pruned.
        limits: the bounds.
    """
    choices, limits = choices or Choices(), limits or Limits()
    masks = isinstance(model, SegmentationModel)
    route, other = ("/segment", "/answer") if masks else ("/answer", "/segment")
    metrics = Metrics((route, "/health", "/strategies", "/metrics"))
    service: Service

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal service
        service = Service(model, choices, limits, metrics)
        yield
        await asyncio.to_thread(service.close)

    # no pages of FastAPI's documentation, which load scripts from elsewhere, and no redirects to where Host says
    pages: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(title="tokenprune", version=__version__, lifespan=lifespan, **pages)
    app.add_middleware(Guard, limits=limits, routes=(route,), metrics=metrics)
    app.add_exception_handler(TokenPruneError, _refused)
    app.add_exception_handler(RequestValidationError, _incomplete)
    app.add_exception_handler(ClosedError, _closed)
    app.add_exception_handler(Exception, _failed)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": model.name, "route": route, "version": __version__}

    @app.get("/strategies")
    async def strategies() -> dict[str, str]:
        """The installed strategies, with what they do."""
        return {name: entry.summary for name, entry in registry.strategies().items()}

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.post(other, include_in_schema=False)
    async def elsewhere() -> None:
        raise HTTPException(404, f"model {model.name!r} {'makes masks' if masks else 'answers in words'}; use {route}")

    if masks:

        @app.post(route, dependencies=[Depends(_fields("image", "query", "strategy", "budget"))])
        async def segment(
            request: Request, image: Picture, query: Query, strategy: StrategyText = None, budget: Budget = None
        ) -> dict[str, Any]:
            """The mask of a query, and what was pruned."""
            return await service.answer(request, image, query, strategy, budget)

    else:

        @app.post(route, dependencies=[Depends(_fields("image", "query", "strategy", "budget", "max_new_tokens"))])
        async def answer(
            request: Request,
            image: Picture,
            query: Query,
            strategy: StrategyText = None,
            budget: Budget = None,
            max_new_tokens: NewTokens = 64,
        ) -> dict[str, Any]:
            """The answer to a question, and what was pruned."""
            return await service.answer(request, image, query, strategy, budget, max_new_tokens)

    return app


def described(done: Done, strategy: Strategy) -> dict[str, Any]:
    """The JSON of a result."""
    about = {
        "text": done.text,
        "strategy": strategy.name,
        "budget": strategy.budget,
        "image_tokens": done.image_tokens,
        "equivalent_tokens": done.equivalent_tokens,
        "layer_tokens": done.layer_tokens,
    }
    if done.mask is None:
        return about
    found = coco.encode(np.asfortranarray(done.mask, dtype=np.uint8))
    return {"mask": {"size": list(map(int, found["size"])), "counts": found["counts"].decode("ascii")}, **about}


def _fields(*names: str) -> Any:
    """A dependency that refuses other fields, fields given twice, and a query string: none is ignored."""

    async def check(request: Request) -> None:
        given = [name for name, _ in (await request.form()).multi_items()]
        wrong = next((name for name in given if name not in names), None)
        if wrong is not None:
            raise HTTPException(422, f"unknown field {shown(wrong)}; the fields are {', '.join(names)}")
        twice = next((name for name in names if given.count(name) > 1), None)
        if twice is not None:
            raise HTTPException(422, f"field {twice!r} is given twice; send it once")
        if request.query_params:
            raise HTTPException(422, "parameters found in the URL; send them as fields of the form")

    return check


async def _left(request: Request) -> None:
    """Until the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _on_cpu(model: Any) -> bool:
    part: Any = getattr(model, "decoder", None) or getattr(model, "model", None)
    return not hasattr(part, "parameters") or next(part.parameters()).device.type == "cpu"


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, OF_CLIENTS):
        return await _failed(request, error)
    line = " ".join(str(error).split())
    return JSONResponse({"detail": line if len(line) <= LONGEST_DETAIL else f"{line[:LONGEST_DETAIL]} …"}, 422)


async def _incomplete(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": "; ".join(map(_problem, error.errors()))[:LONGEST_DETAIL]}, 422)


def _problem(found: dict[str, Any]) -> str:
    """One of FastAPI's findings about a request's fields, in a sentence."""
    field = ".".join(map(str, found["loc"][1:]))
    if found["type"] == "missing":
        return f"field {field!r} is missing; give it a value"
    return f"field {field!r}: {shown(found.get('input'))} found; {found['msg']}"


async def _closed(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the server stops; ask another one"}, 503, RETRY)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse({"detail": FAILED}, 500)
