"""Problem details (RFC 9457): every error of the API names the thing and the remedy."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.ledger.contract import ConflictError
from coordinator.model.errors import FlushpointError, NotFoundError, RefusedError, UnavailableError, UsageError

_STATUS: tuple[tuple[type[FlushpointError], int, str], ...] = (
    (NotFoundError, 404, "Not found"),
    (RefusedError, 409, "Refused"),
    (ConflictError, 409, "Conflict"),
    (UsageError, 422, "Usage"),
    (UnavailableError, 503, "Unavailable"),
)


def problem(status: int, title: str, detail: str, remedy: str, code: str) -> JSONResponse:
    body = {
        "type": f"urn:flushpoint:{code}",
        "title": title,
        "status": status,
        "detail": detail,
        "remedy": remedy,
        "code": code,
    }
    return JSONResponse(body, status, media_type="application/problem+json")


class _CancelledIsUnavailable:
    """The server cancels what is still at work when its time to stop is over, and would answer with a bare 500, which
    says that Flushpoint is broken. Nothing is: the same call may be made again."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def send_on(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_on)
        except asyncio.CancelledError:
            if has_begun or scope["type"] != "http":
                raise
            stopping = UnavailableError("the coordinator stopped before it was done with this", "ask again")
            answer = problem(503, "Unavailable", stopping.message, stopping.remedy, stopping.code)
            await answer(scope, receive, send)


def install(app: FastAPI) -> None:
    """Answer every error of ours, of validation and of routing with a problem document."""
    app.add_middleware(_CancelledIsUnavailable)

    @app.exception_handler(FlushpointError)
    def ours(request: Request, error: FlushpointError) -> JSONResponse:
        for kind, status, title in _STATUS:
            if isinstance(error, kind):
                return problem(status, title, error.message, error.remedy, error.code)
        return problem(500, "Failed", error.message, error.remedy, error.code)

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        detail = f"{where}: {first['msg']}" if where else str(first["msg"])
        return problem(422, "Usage", detail, "see /docs for what this call takes", "usage")

    @app.exception_handler(HTTPException)
    def routing(request: Request, error: HTTPException) -> JSONResponse:
        code = "not-found" if error.status_code == 404 else "usage"
        return problem(error.status_code, str(error.detail), str(error.detail), "see /docs", code)
