"""A server for the viewer's tests: its script, the files of a folder, and a place for masks to go to."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from streamlit.starlette import App

FOLDER = Path(os.environ["VIEWER_SITE"])
STATIC = Path(__file__).parents[3] / "app" / "streamlit" / "viewer" / "static"


async def static(request: Request) -> Response:
    name = request.path_params["file"]
    if name not in json.loads((STATIC / "manifest.json").read_text())["files"]:
        return Response(status_code=404)
    return FileResponse(STATIC / name, headers={"Cache-Control": "public, max-age=31536000, immutable"})


async def volume(request: Request) -> Response:
    name = request.path_params["file"]
    headers = {"Content-Encoding": "identity", "Cache-Control": "no-store"}
    if name.startswith("slow_"):
        return StreamingResponse(_slow(FOLDER / name.removeprefix("slow_")), headers=headers)
    return FileResponse(FOLDER / name, headers=headers)


async def _slow(path: Path) -> AsyncIterator[bytes]:
    """A file whose second half comes when the test says so; its header fits into the first."""
    content = gzip.decompress(path.read_bytes())
    yield content[: len(content) // 2]
    while not (FOLDER / "go").exists():
        await asyncio.sleep(0.05)
    yield content[len(content) // 2 :]


async def save(request: Request) -> Response:
    case, body = request.path_params["case"], await request.body()
    number = len(list(FOLDER.glob(f"saved_{case}_*.gz"))) + 1
    (FOLDER / f"saved_{case}_{number}.gz").write_bytes(body)
    (FOLDER / f"saved_{case}_{number}.json").write_text(json.dumps(dict(request.headers)))
    theirs = FOLDER / f"conflict_{case}.json"
    if theirs.exists():
        answer = theirs.read_text()
        theirs.unlink()
        return JSONResponse(json.loads(answer), status_code=409)
    revision = int(request.headers["if-match"].strip('"')) + 1
    return JSONResponse({"revision": revision, "changed_voxels": 1, "sha256": "0" * 64})


if __name__ == "__main__":
    App(
        Path(__file__).parent / "page.py",
        routes=[
            Route("/medseg/static/{file}", static),
            Route("/files/{file}", volume),
            Route("/save/{case}", save, methods=["POST"]),
        ],
    ).run(
        config={
            "server.address": "127.0.0.1",
            "server.port": int(sys.argv[1]),
            "server.headless": True,
            "server.fileWatcherType": "none",
            "browser.gatherUsageStats": False,
            "theme.base": "dark",
        }
    )
