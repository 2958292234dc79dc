"""Asks for the bearer token before anything else looks at a request."""

from typing import Final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvtier.errors import Unauthenticated
from kvtier.router.http.openai import error_body
from kvtier.wire.access import HEADER, Access

HEALTH: Final = "/health"  # probes have no token to show
METRICS: Final = "/metrics"


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """`app` for those who show a token that `access` takes; others get status 401.

    Open to all: health, and, unless `auth.open_metrics` is off, metrics.
    """
    if access.tokens is None:
        return app

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _open(scope["path"], access):
            shown = Headers(scope=scope).getlist(HEADER)
            try:
                access.check(shown[0] if len(shown) == 1 else "")
            except Unauthenticated as error:
                headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
                refusal = JSONResponse(error_body(error), 401, headers)
                await refusal(scope, receive, send)
                return
        await app(scope, receive, send)

    return guard


def _open(path: str, access: Access) -> bool:
    return path == HEALTH or (path == METRICS and access.open_metrics)
