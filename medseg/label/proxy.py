"""The DICOMweb server for the viewer that MONAI Label's server carries: OHIF reaches it through this server only.

MONAI Label's own proxy drops the query, so that no filter of the study list works; passes the client's token on; and
follows ".." out of the service into whatever else the machine offers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator

import httpx
from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from monailabel.config import settings
from monailabel.endpoints.user.auth import RBAC
from starlette.background import BackgroundTask
from starlette.requests import Request

from medseg.label.serve import app_folder

log = logging.getLogger(__name__)

_RESOURCES = {
    "GET": re.compile(r"dicom/(?:qido|wado)/((?:studies|series|instances)(?:/[A-Za-z0-9._,-]+)*)"),
    "POST": re.compile(r"dicom/wado/(studies(?:/[0-9.]+)?)"),
}
_ASKED = ("accept", "accept-encoding", "content-type", "content-length")
_ANSWERED = ("content-type", "content-encoding", "content-length")
_TIMEOUT_S = 120.0


def dicomweb_routes(url: str, login: tuple[str, str] | None) -> APIRouter:
    """The routes that OHIF uses.

    Args:
        url: of the DICOMweb service.
        login: name and password for it, which no client sees.
    """
    client = httpx.AsyncClient(auth=login, timeout=_TIMEOUT_S, follow_redirects=False)
    router = APIRouter()

    async def forward(request: Request, path: str) -> Response:
        resource = _RESOURCES[request.method].fullmatch(path)
        if resource is None or ".." in path:
            return JSONResponse({"detail": "no resource of a DICOMweb server"}, status_code=404)
        headers = {"accept-encoding": "identity"}
        headers |= {key: request.headers[key] for key in _ASKED if key in request.headers}
        content: AsyncIterator[bytes] | None = request.stream() if request.method == "POST" else None
        query = f"?{request.url.query}" if request.url.query else ""  # as it came: "*" has to stay what it is
        asked = client.build_request(request.method, f"{url}/{resource[1]}{query}", headers=headers, content=content)
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as err:
            log.info("DICOMweb server: %s", type(err).__name__)
            return JSONResponse({"detail": "DICOMweb server: does not answer; is it running?"}, status_code=502)
        kept = {key: answer.headers[key] for key in _ANSWERED if key in answer.headers}
        return StreamingResponse(
            answer.aiter_raw(), status_code=answer.status_code, headers=kept, background=BackgroundTask(answer.aclose)
        )

    reader, writer = settings.MONAI_LABEL_AUTH_ROLE_USER, settings.MONAI_LABEL_AUTH_ROLE_ANNOTATOR
    for method, role in (("GET", reader), ("POST", writer)):
        router.add_api_route("/proxy/{path:path}", forward, methods=[method], dependencies=[Depends(RBAC(role))])

    @router.get("/ohif/app-config.js")
    async def settings_of_ohif() -> Response:
        path = app_folder() / "ohif.js"
        return FileResponse(path, media_type="text/javascript", headers={"Cache-Control": "no-cache"})

    return router
