"""Serves the page from this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tokenprune.utils.extras import check_modules
from tokenprune.utils.sockets import url_of

if TYPE_CHECKING:
    import socket

    from fastapi import FastAPI

    from tokenprune.evaluation.models import SegmentationModel
    from tokenprune.utils.threads import ThreadChoice

NEEDED = ("gradio", "matplotlib", "jinja2")
MOST = "20mb"  # of an uploaded file


def check_installed() -> None:
    """Check before any work that the page can be made; nothing is imported.

    Raises:
        UnsupportedError: a package is missing.
    """
    check_modules("the demo", NEEDED, "demo")


def address(listening: socket.socket) -> str:
    """The page's address in a browser."""
    return f"{url_of(listening)}/"


def app_of(model: SegmentationModel, uploads: str, threads: ThreadChoice | None = None) -> FastAPI:
    """The page of a model as an application, which sends nothing to other machines and fetches nothing from them.

    Args:
        model: the model.
        uploads: folder for uploaded files, which are deleted after an hour or two; the caller deletes the folder.
        threads: processor threads.
    """
    # Before the import, which reads them.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = uploads
    import fastapi
    import gradio

    from tokenprune.demo.page import build
    from tokenprune.demo.session import Session
    from tokenprune.demo.view import style

    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app = fastapi.FastAPI()
    gradio.mount_gradio_app(
        app,
        build(Session(model, threads)),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MOST,
        ssr_mode=False,  # would start Node.js
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500"),
        css=style(),
    )
    return app


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve an application until the process is interrupted."""
    import uvicorn

    # Browsers hold a stream open, which must not delay the end.
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(settings).run(sockets=[listening])
