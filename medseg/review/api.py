"""HTTP routes of the review app: voxels out, masks and scans in. Every request carries a signed claim."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import get_args

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from medseg.errors import MedsegError, OutputError
from medseg.review.compare import difference_file, segmentation, shown_labels
from medseg.review.derived import poster, reduced_image
from medseg.review.saving import save_drawing, save_screenshot
from medseg.review.signing import BadClaimError, Claim, Purpose, Signer, Writing
from medseg.review.store.models import User
from medseg.review.store.repo import Conflict, Store
from medseg.review.uploads import MOST_PARTS, begin_part, upload_folder

log = logging.getLogger(__name__)

PREFIX = "/medseg/api/v1"
LARGEST_MASK_BYTES = 64 << 20
LARGEST_SCREENSHOT_BYTES = 8 << 20
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
        largest_upload: bytes of an upload, in all its files.
    """

    def __init__(self, store: Store, signer: Signer, *, largest_upload: int = LARGEST_UPLOAD_BYTES) -> None:
        self._store, self._signer, self._largest_upload = store, signer, largest_upload

    def routes(self) -> list[Route]:
        """To mount beside the page."""
        return [
            Route(f"{PREFIX}/volume/{{id}}", _answering(self._volume), methods=["GET"]),
            Route(f"{PREFIX}/reduced/{{id}}", _answering(self._reduced), methods=["GET"]),
            Route(f"{PREFIX}/poster/{{id}}", _answering(self._poster), methods=["GET"]),
            Route(f"{PREFIX}/labels/{{id}}", _answering(self._labels), methods=["GET"]),
            Route(f"{PREFIX}/uncertainty/{{id}}", _answering(self._uncertainty), methods=["GET"]),
            Route(f"{PREFIX}/evidence/{{id}}", _answering(self._evidence), methods=["GET"]),
            Route(f"{PREFIX}/phase/{{id}}", _answering(self._phase), methods=["GET"]),
            Route(f"{PREFIX}/difference/{{id}}", _answering(self._difference), methods=["GET"]),
            Route(f"{PREFIX}/mask/{{id}}", _answering(self._save), methods=["POST"]),
            Route(f"{PREFIX}/screenshot/{{id}}", _answering(self._screenshot), methods=["POST"]),
            Route(f"{PREFIX}/upload/{{id}}", _answering(self._upload), methods=["POST"]),
            Route("/medseg/healthz", _healthy, methods=["GET"]),
        ]

    async def _volume(self, request: Request) -> Response:
        await self._claimed(request, "volume", request.query_params.get("t", ""))
        case = await run_in_threadpool(self._store.case, request.path_params["id"])
        return _file(self._store.file(case.image_path))

    async def _reduced(self, request: Request) -> Response:
        await self._claimed(request, "reduced", request.query_params.get("t", ""))
        case = await run_in_threadpool(self._store.case, request.path_params["id"])
        return _file(await run_in_threadpool(reduced_image, self._store, case))

    async def _poster(self, request: Request) -> Response:
        await self._claimed(request, "poster", request.query_params.get("t", ""))
        case = await run_in_threadpool(self._store.case, request.path_params["id"])
        return _file(await run_in_threadpool(poster, self._store, case), "image/png")

    async def _labels(self, request: Request) -> Response:
        await self._claimed(request, "labels", request.query_params.get("t", ""))
        case_id, name = _parts(request, 2)
        found = await run_in_threadpool(segmentation, self._store, case_id, name)
        return _file(await run_in_threadpool(shown_labels, self._store, found))

    async def _uncertainty(self, request: Request) -> Response:
        await self._claimed(request, "uncertainty", request.query_params.get("t", ""))
        prediction = await run_in_threadpool(self._store.prediction, request.path_params["id"])
        if not prediction.uncertainty_path:
            raise _Refusal(404, "the run kept no uncertainty; ask for it when you run the model")
        return _file(self._store.file(prediction.uncertainty_path))

    async def _evidence(self, request: Request) -> Response:
        await self._claimed(request, "evidence", request.query_params.get("t", ""))
        prediction = await run_in_threadpool(self._store.prediction, request.path_params["id"])
        if not prediction.evidence_path:
            raise _Refusal(404, "the run kept no evidence map")
        return _file(self._store.file(prediction.evidence_path))

    async def _phase(self, request: Request) -> Response:
        await self._claimed(request, "phase", request.query_params.get("t", ""))
        prediction_id, place = _parts(request, 2)
        prediction = await run_in_threadpool(self._store.prediction, prediction_id)
        paths = list(prediction.phase_paths.values())
        if not place.isascii() or not place.isdecimal() or len(place) > 2 or int(place) >= len(paths):
            raise _Refusal(404, "the run kept no such phase")
        return _file(self._store.file(paths[int(place)]))

    async def _difference(self, request: Request) -> Response:
        await self._claimed(request, "difference", request.query_params.get("t", ""))
        case_id, first, second, value = _parts(request, 4)
        if value and not (value.isascii() and value.isdecimal() and len(value) < 7):
            raise _Refusal(404, "no such label")
        label = int(value) if value else None
        return _file(await run_in_threadpool(difference_file, self._store, case_id, first, second, value=label))

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

    async def _screenshot(self, request: Request) -> Response:
        by = await self._claimed(request, "screenshot", request.headers.get("x-medseg-token", ""))
        body = b"".join([chunk async for chunk in _limited(request, LARGEST_SCREENSHOT_BYTES)])
        case_id = request.path_params["id"]
        await run_in_threadpool(save_screenshot, self._store, case_id, body, by=by)
        log.info("case %s: picture taken by user %s", case_id, by.id)
        return JSONResponse({"case_id": case_id}, status_code=201, headers=_HEADERS)

    async def _upload(self, request: Request) -> Response:
        await self._claimed(request, "upload", request.headers.get("x-medseg-token", ""))
        part = request.headers.get("x-medseg-part", "")
        if not part.isascii() or not part.isdecimal() or not 1 <= int(part[:9]) <= MOST_PARTS:
            raise _Refusal(422, f"an upload has at most {MOST_PARTS} files")
        choice = request.headers.get("x-medseg-choice", "0")
        if not choice.isascii() or not choice.isdecimal() or len(choice) > 15:
            raise _Refusal(422, "the number of the choice has at most 15 digits")
        folder = upload_folder(self._store.folder, request.path_params["id"])
        try:
            path, before = await run_in_threadpool(begin_part, folder, int(part), int(choice))
            try:
                with path.open("wb") as file:
                    async for chunk in _limited(request, self._largest_upload, before=before):
                        await run_in_threadpool(file.write, chunk)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        except OSError as err:
            problem = f"cannot be kept ({err.strerror or err})"
            raise OutputError("upload", problem, "make room in the data folder") from err
        return JSONResponse({"part": int(part)}, status_code=201, headers=_HEADERS)

    async def _claimed(self, request: Request, purpose: Purpose, token: str) -> User:
        """The user whose claim comes with the request.

        Raises:
            BadClaimError: there is none, or it does not cover this.
        """
        claim: Claim = self._signer.verify(token, purpose, request.path_params.get("id", ""), cookies=request.cookies)
        try:
            user = await run_in_threadpool(self._store.user, claim.user_id)
        except MedsegError:
            raise BadClaimError from None
        if purpose in get_args(Writing) and user.role == "reader":
            raise PermissionError("the role reader may not save; ask an administrator for the role reviewer")
        return user


def _answering(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Turn failures into answers that name no file and no value of a scan."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except BadClaimError:
            return _error(403, "the link is not valid any more; reload the page")
        except ClientDisconnect:
            return _error(400, "the connection ended")
        except PermissionError as error:
            return _error(403, str(error))
        except _Refusal as refusal:
            return _error(refusal.status, refusal.problem)
        except MedsegError as error:
            missing = error.problem.startswith("no such")
            text = error.problem + (f"; {error.remedy}" if error.remedy else "")
            return _error(404 if missing else 507 if error.exit_code in {5, 6} else 422, text)

    return answer


async def _limited(request: Request, most: int, *, before: int = 0) -> AsyncIterator[bytes]:
    """The body's chunks, up to `most` bytes together with the `before` bytes that came earlier."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and before + int(announced) > most:
        raise _Refusal(413, f"more than {most} bytes")
    done = before
    async for chunk in request.stream():
        done += len(chunk)
        if done > most:
            raise _Refusal(413, f"more than {most} bytes")
        yield chunk


def _parts(request: Request, most: int) -> list[str]:
    """The identifiers of a target, joined by dots; missing ones at the end are ""."""
    found = str(request.path_params["id"]).split(".")
    if len(found) > most:
        raise _Refusal(404, "no such thing")
    return found + [""] * (most - len(found))


def _file(path: Path, media_type: str = "application/octet-stream") -> Response:
    if not path.is_file():
        raise _Refusal(410, "the file is gone from the data folder")
    return FileResponse(path, headers=_HEADERS, media_type=media_type)


def _error(status: int, problem: str) -> Response:
    return JSONResponse({"error": problem}, status_code=status, headers=_HEADERS)


async def _healthy(_request: Request) -> Response:
    return Response(status_code=204)
