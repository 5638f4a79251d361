"""The web server of `tokenprune serve`: one model, any number of clients, one strategy per request.

`app` has the routes, `guard` bounds what comes in, `connections` what a client may hold open, `batches` runs what
waits. Packages of the extra `serve` are imported when a server is made.
"""

from __future__ import annotations
