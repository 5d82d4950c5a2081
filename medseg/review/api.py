"""HTTP routes of the review app: voxels out, masks and scans in. Every request carries a signed claim."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from medseg.errors import MedsegError
from medseg.review.masks import read_mask, to_screen, write_mask
from medseg.review.saving import save_drawing
from medseg.review.signing import BadClaimError, Claim, Purpose, Signer
from medseg.review.store.models import Mask, User, new_id
from medseg.review.store.repo import Conflict, Store
from medseg.review.worklist import import_upload

log = logging.getLogger(__name__)

PREFIX = "/medseg/api/v1"
LARGEST_MASK_BYTES = 64 << 20
LARGEST_UPLOAD_BYTES = 2 << 30

_HEADERS = {
    "Content-Encoding": "identity",
    "Cache-Control": "private, no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Refusal(Exception):  # noqa: N818 - it is an answer
    def __init__(self, status: int, problem: str) -> None:
        self.status, self.problem = status, problem


class Api:
    """The routes over one store.

    Args:
        store: the store.
        signer: shared with whoever hands out the URLs.
        largest_upload: bytes of a scan.
    """

    def __init__(self, store: Store, signer: Signer, *, largest_upload: int = LARGEST_UPLOAD_BYTES) -> None:
        self._store, self._signer, self._largest_upload = store, signer, largest_upload

    def routes(self) -> list[Route]:
        """To mount beside the page."""
        return [
            Route(f"{PREFIX}/volume/{{id}}", _answering(self._volume), methods=["GET"]),
            Route(f"{PREFIX}/mask/{{id}}", _answering(self._mask), methods=["GET"]),
            Route(f"{PREFIX}/poster/{{id}}", _answering(self._poster), methods=["GET"]),
            Route(f"{PREFIX}/mask/{{id}}", _answering(self._save), methods=["POST"]),
            Route(f"{PREFIX}/upload", _answering(self._upload), methods=["POST"]),
            Route("/medseg/healthz", _healthy, methods=["GET"]),
        ]

    async def _volume(self, request: Request) -> Response:
        await self._claimed(request, "volume", request.query_params.get("t", ""))
        case = await run_in_threadpool(self._store.case, request.path_params["id"])
        return _file(self._store.file(case.image_path))

    async def _mask(self, request: Request) -> Response:
        await self._claimed(request, "mask", request.query_params.get("t", ""))
        mask = await run_in_threadpool(self._store.mask, request.path_params["id"])
        return _file(await run_in_threadpool(self._shown, mask))

    async def _poster(self, request: Request) -> Response:
        await self._claimed(request, "poster", request.query_params.get("t", ""))
        picture = await run_in_threadpool(self._picture, request.path_params["id"])
        return Response(picture, media_type="image/png", headers=_HEADERS)

    async def _save(self, request: Request) -> Response:
        by = await self._claimed(request, "save", request.headers.get("x-medseg-token", ""))
        base = request.headers.get("if-match", "").strip('"')
        if not base.isascii() or not base.isdecimal() or len(base) > 9:
            raise _Refusal(428, "If-Match must name the revision that was edited")
        body = b"".join([chunk async for chunk in _limited(request, LARGEST_MASK_BYTES)])
        case_id = request.path_params["id"]
        found = await run_in_threadpool(
            save_drawing,
            self._store,
            case_id,
            body,
            base_revision=int(base),
            by=by,
            draft_id=request.headers.get("x-medseg-draft"),
        )
        if isinstance(found, Conflict):
            log.info("case %s: save of user %s came second (%d, %d)", case_id, by.id, found.yours, found.theirs)
            return JSONResponse({"case_id": case_id, **vars(found)}, status_code=409, headers=_HEADERS)
        mask = found.mask
        log.info("case %s: user %s saved revision %d", case_id, by.id, mask.revision)
        return JSONResponse(
            {
                "case_id": case_id,
                "revision": mask.revision,
                "changed_voxels": mask.changed_voxels,
                "sha256": mask.sha256,
            },
            headers=_HEADERS,
        )

    async def _upload(self, request: Request) -> Response:
        by = await self._claimed(request, "upload", request.headers.get("x-medseg-token", ""))
        with tempfile.NamedTemporaryFile(dir=self._store.folder, prefix=".upload-") as file:  # 0600, gone afterwards
            async for chunk in _limited(request, self._largest_upload):
                await run_in_threadpool(file.write, chunk)
            file.flush()
            case = await run_in_threadpool(self._import, Path(file.name), by)
        log.info("case %s: uploaded by user %s", case, by.id)
        return JSONResponse({"case_id": case}, status_code=201, headers=_HEADERS)

    def _import(self, file: Path, by: User) -> str:
        name = f"upload {new_id()[:8]}"  # a file's name may say who the patient is
        return import_upload(self._store, file, name=name, by=by).id

    async def _claimed(self, request: Request, purpose: Purpose, token: str) -> User:
        """The user whose claim comes with the request.

        Raises:
            BadClaimError: there is none, or it does not cover this.
        """
        claim: Claim = self._signer.verify(token, purpose, request.path_params.get("id", ""))
        try:
            user = await run_in_threadpool(self._store.user, claim.user_id)
        except MedsegError:
            raise BadClaimError from None
        if purpose in {"save", "upload"} and user.role == "reader":
            raise PermissionError("the role reader may not save; ask an administrator for the role reviewer")
        return user

    def _shown(self, mask: Mask) -> Path:
        """The file of a mask in the values that the viewer draws; made once where they differ from the labels."""
        path = self._store.file(mask.path)
        screen = {row.value: row.screen_value for row in self._store.labels(mask.case_id)}
        if all(value == shown for value, shown in screen.items()):
            return path
        drawn = path.with_name(f"screen_{mask.id}.nii.gz")
        if not drawn.exists():
            case = self._store.case(mask.case_id)
            labels, _ = read_mask(path, case.shape)
            write_mask(drawn, to_screen(labels, screen), self._store.file(case.grid_path), screen.values())
        return drawn

    def _picture(self, case_id: str) -> bytes:
        """Three planes of a case with its current version."""
        from medseg.io.read import read_volume
        from medseg.report.preview import render_preview

        case = self._store.case(case_id)
        volume = read_volume(self._store.file(case.image_path))
        stored = self._store.version(case_id, case.revision).path if case.revision else case.grid_path
        labels, _ = read_mask(self._store.file(stored), case.shape)
        names = {row.value: row.name for row in self._store.labels(case_id)}
        return render_preview(volume.data[0], labels, volume.affine, names, title=case.name)


def _answering(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Turn failures into answers that name no file and no value of a scan."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except BadClaimError:
            return _error(403, "the link is not valid any more; reload the page")
        except PermissionError as error:
            return _error(403, str(error))
        except _Refusal as refusal:
            return _error(refusal.status, refusal.problem)
        except MedsegError as error:
            missing = error.problem.startswith("no such")
            text = error.problem + (f"; {error.remedy}" if error.remedy else "")
            return _error(404 if missing else 507 if error.exit_code in {5, 6} else 422, text)

    return answer


async def _limited(request: Request, most: int) -> AsyncIterator[bytes]:
    """The body's chunks, up to `most` bytes in all."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > most:
        raise _Refusal(413, f"more than {most} bytes")
    done = 0
    async for chunk in request.stream():
        done += len(chunk)
        if done > most:
            raise _Refusal(413, f"more than {most} bytes")
        yield chunk


def _file(path: Path) -> Response:
    if not path.is_file():
        raise _Refusal(410, "the file is gone from the data folder")
    return FileResponse(path, headers=_HEADERS, media_type="application/octet-stream")


def _error(status: int, problem: str) -> Response:
    return JSONResponse({"error": problem}, status_code=status, headers=_HEADERS)


async def _healthy(_request: Request) -> Response:
    return Response(status_code=204)
