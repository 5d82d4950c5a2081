"""MONAI Label's server, with what it leaves open closed: the ASGI application that ``medseg label serve`` runs."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, urlsplit

from monailabel.app import app
from monailabel.config import settings
from monailabel.interfaces.exception import MONAILabelException
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medseg.errors import DeviceError, MedsegError, MemoryBudgetError, OutputError
from medseg.label.parameters import is_session
from medseg.label.proxy import dicomweb_routes
from medseg.label.serve import is_address, login
from medseg.label.tokens import name_algorithm

log = logging.getLogger(__name__)

_CLOSED = (
    ("PUT", re.compile(r"/model/.*"), "weights are not replaced; train a new version"),
    ("DELETE", re.compile(r"/model/.*"), "weights are not removed"),
    ("*", re.compile(r"/reload/?"), "restart the server"),
    ("*", re.compile(r"/infer/wsi.*"), "medseg has no models for microscopy"),
)
_NO_DICOMWEB = ("*", re.compile(r"/proxy/.*"), "there is no DICOMweb server behind this one")
_STATUS: dict[type[MedsegError], int] = {MemoryBudgetError: 413, OutputError: 507, DeviceError: 503}


class Guard:
    """Refuses requests before they reach MONAI Label.

    Args:
        inner: the application.
        hosts: names that this server goes by; another one in a request is a web page that rebound its own name to
            this machine. Empty: any.
        origins: web pages that may use the server.
        closed: methods ("*": any) and paths that are refused, and why.
    """

    def __init__(
        self,
        inner: ASGIApp,
        *,
        hosts: Sequence[str],
        origins: Sequence[str],
        closed: Sequence[tuple[str, re.Pattern[str], str]],
    ) -> None:
        self._inner, self._hosts, self._origins, self._closed = inner, hosts, origins, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request with 4xx, or pass it on."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            status, detail = refusal
            await JSONResponse({"detail": detail}, status_code=status)(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._inner(scope, receive, watched)
        except Exception as err:
            # A traceback's last line may repeat what a client sent; type and place do not.
            place = err.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            line = f"{place.tb_frame.f_code.co_name}:{place.tb_lineno}" if place is not None else "?"
            log.error("internal error: %s in %s", type(err).__name__, line)
            if not begun:
                answer = JSONResponse({"detail": f"internal error ({type(err).__name__})"}, status_code=500)
                await answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts and urlsplit(f"//{host}").hostname not in self._hosts:
            return 400, "this server does not go by that name"
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and urlsplit(origin).netloc != host:
            return 403, "web pages from there may not use this server"
        for method, path, why in self._closed:
            if method in ("*", scope["method"]) and path.fullmatch(scope["path"]):
                return 403, f"closed: {why}"
        for key, value in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
            if key == "session_id" and value and not is_session(value):
                return 422, "session_id: not one that this server gave out"
            if key == "uncompress" and value.lower() not in ("", "0", "false", "no", "off"):
                return 422, "uncompress: archives are not unpacked here; a .zip with a DICOM series is read as it is"
        return None


async def _refused(_request: Request, error: Exception) -> JSONResponse:
    """A failure with a known cause, which MONAI Label would answer with 500 and no word."""
    assert isinstance(error, MedsegError)  # noqa: S101 - what it is registered for
    status = _STATUS.get(type(error), 422)
    log.info("refused (%d): %s", status, error.problem)
    return JSONResponse({"detail": str(error)}, status_code=status)


async def _not_found(_request: Request, error: Exception) -> JSONResponse:
    """MONAI Label's word for a model, strategy, image or label that is not there."""
    assert isinstance(error, MONAILabelException)  # noqa: S101 - what it is registered for
    return JSONResponse({"detail": "no such model, method, strategy, image or label"}, status_code=404)


async def _no_json(_request: Request, _error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "params: not JSON"}, status_code=422)


def close(*, hosts: Sequence[str], origins: Sequence[str], dicomweb: str) -> None:
    """Put the guard around MONAI Label's application, and routes for OHIF before its own.

    Args:
        hosts: names that the server goes by; empty: any.
        origins: web pages that may use it.
        dicomweb: address of the DICOMweb server, "" for none.
    """
    if dicomweb:
        app.router.routes[:0] = dicomweb_routes(dicomweb, login(settings.model_dump())).routes
    app.add_exception_handler(MedsegError, _refused)
    app.add_exception_handler(MONAILabelException, _not_found)
    app.add_exception_handler(json.JSONDecodeError, _no_json)
    # MONAI Label lets every page in, and does not start with a list of those that may.
    app.user_middleware = [one for one in app.user_middleware if one.cls is not CORSMiddleware]
    app.add_middleware(
        CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST", "PUT"], allow_headers=["*"]
    )
    closed = _CLOSED if dicomweb else (*_CLOSED, _NO_DICOMWEB)
    app.add_middleware(Guard, hosts=hosts, origins=origins, closed=closed)


name_algorithm()
_conf = settings.MONAI_LABEL_APP_CONF
close(
    hosts=json.loads(_conf.get("hosts", "[]")),
    origins=json.loads(_conf.get("origins", "[]")),
    dicomweb=settings.MONAI_LABEL_STUDIES if is_address(settings.MONAI_LABEL_STUDIES) else "",
)
