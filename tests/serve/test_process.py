"""`tokenprune serve` as a process of its own: the mask of a direct call, and an end that finishes its work."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from serving import encoded, process

import tokenprune as tp
from tokenprune.datasets.shapes import Shapes

SECONDS = 60


def post(url: str, file: bytes, **fields: str) -> httpx.Response:
    return httpx.post(
        f"{url}/segment", files={"image": file}, data=fields, timeout=SECONDS, trust_env=False, verify=False
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_masks_and_the_end(number: signal.Signals) -> None:
    """Requests that were accepted are answered after the signal; new ones are not, and the program ends well."""
    scene = next(iter(Shapes().scenes("test", limit=1, seed=5)))
    file, query = encoded(Image.fromarray(scene.image)), scene.queries[0].text
    model: Any = tp.load("lisa-tiny")
    wanted = model.segment(scene.image, query, tp.strategy("csp", budget=0.35))
    with process("lisa-tiny", "--strategy", "csp", "--budget", "0.35", "--threads", "1") as (running, url):
        said = post(url, file, query=query).json()
        mask = coco.decode(said["mask"]).astype(bool)
        assert np.array_equal(mask, wanted.masks[0].numpy())
        assert said["equivalent_tokens"] == wanted.trace.ledger.equivalent_tokens
        with ThreadPoolExecutor(8) as clients:
            sent = [clients.submit(post, url, file, query=query) for _ in range(8)]
            waiting = 0.0
            while waiting < 1:
                found = re.search(
                    r"^tokenprune_queue_length (\S+)$",
                    httpx.get(f"{url}/metrics", trust_env=False, verify=False).text,
                    re.MULTILINE,
                )
                assert found is not None
                waiting = float(found[1])
            running.send_signal(number)
            answers = [future.exception() or future.result() for future in sent]
        assert running.wait(SECONDS) == 0
        assert running.stderr is not None
        assert running.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", trust_env=False, verify=False)
    # one that had not been accepted yet is refused by the operating system
    served = [answer for answer in answers if not isinstance(answer, httpx.TransportError)]
    assert len(served) >= 2
    for answer in served:
        assert np.array_equal(coco.decode(answer.json()["mask"]).astype(bool), mask)
