"""The server: Streamlit's page and medseg's own routes on one port, in one process."""

from __future__ import annotations

import importlib.util
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from medseg.errors import DeviceError, UsageError
from medseg.review.api import Api
from medseg.review.intake import Intake
from medseg.review.jobs import JobQueue
from medseg.review.settings import Settings, is_local
from medseg.review.signing import Signer
from medseg.review.store.repo import Store
from medseg.review.uploads import drop_old_uploads

if TYPE_CHECKING:
    from streamlit.starlette import App

log = logging.getLogger(__name__)

_YEAR_S = 31536000


@dataclass(frozen=True)
class Services:
    """What routes and pages share.

    Attributes:
        settings: where and for whom.
        store: the store.
        signer: signs links to voxels.
        queue: runs bundles.
        intake: imports folders.
    """

    settings: Settings
    store: Store
    signer: Signer
    queue: JobQueue
    intake: Intake

    @classmethod
    def open(cls, settings: Settings) -> Services:
        """Open the store; nothing runs yet.

        Raises:
            InputError: the data folder or database cannot be used. UsageError: an address that is no database.
        """
        store = Store.in_folder(settings.data)
        if settings.database:
            store.close()
            store = Store(settings.database, settings.data)
        intake = Intake(store, [settings.data, *settings.scans])
        return cls(settings, store, Signer(settings.key), JobQueue(store), intake)

    def start(self) -> None:
        """Begin to import and to run jobs; uploads that nobody added go."""
        drop_old_uploads(self.store.folder)
        self.intake.start()
        self.queue.start()

    def stop(self) -> None:
        """End the run that is at work and close the store."""
        self.queue.stop()
        self.store.close()


_shared: list[Services] = []


def share(services: Services) -> None:
    """Make services those that the pages of this process use."""
    _shared[:] = [services]


def services() -> Services:
    """The services of this process.

    Streamlit runs the page's script again and again in threads of this process and passes it nothing, which is why
    they are kept here.
    """
    if not _shared:
        raise RuntimeError("the page was started without medseg review")
    return _shared[0]


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken, before anything is opened.

    Raises:
        UsageError: it is, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as err:
            problem = f"cannot listen there ({err.strerror or err})"
            raise UsageError(f"{host}:{port}", problem, "give another --port") from err


def app_folder() -> Path:
    """Folder of the page: inside the installed package, or app/streamlit of a source checkout.

    Raises:
        DeviceError: neither is there.
    """
    package = Path(str(resources.files("medseg")))
    for folder in (package / "_app" / "streamlit", package.parent / "app" / "streamlit"):
        if (folder / "page.py").is_file():
            return folder
    raise DeviceError("review page", "not found", "reinstall medseg")


def build_app(settings: Settings, *, hosts: tuple[str, ...] = ()) -> App:
    """The application: page and routes over one store, which is open from now on.

    Args:
        settings: where and for whom.
        hosts: further names by which a browser on this machine may call the server.

    Raises:
        DeviceError: Streamlit, the page, or what a login needs is not installed. See `Services.open` for the rest.
    """
    try:
        from streamlit.starlette import App
    except ImportError as err:
        raise DeviceError("Streamlit 1.67 or later", "is not installed", "pip install 'medseg[app]'") from err
    if settings.login is not None:
        missing = [name for name in ("authlib", "httpx") if importlib.util.find_spec(name) is None]
        if missing:
            raise DeviceError("--login", f"{' and '.join(missing)} not installed", "pip install 'medseg[auth]'")
    page = app_folder() / "page.py"
    found = Services.open(settings)
    share(found)

    @asynccontextmanager
    async def lifespan(_app: App) -> AsyncIterator[dict[str, Any]]:
        found.start()
        try:
            yield {}
        finally:
            found.stop()

    # Another site's name that leads to this machine (DNS rebinding) would make its scripts ours.
    local = ["localhost", "127.0.0.1", "[::1]", "::1", *hosts]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=local)] if is_local(settings.host) else []
    largest = settings.upload_mb << 20
    return App(
        page,
        lifespan=lifespan,
        routes=[
            static_route(page.parent / "viewer" / "static"),
            *Api(found.store, found.signer, largest_upload=largest).routes(),
        ],
        middleware=middleware,
    )


def static_route(folder: Path) -> Route:
    """``GET /medseg/static/{file}``: the viewer's built files, whose names change with their content.

    Args:
        folder: with the files, and `manifest.json`, which lists those that are served.
    """

    async def static(request: Request) -> Response:
        name = request.path_params["file"]
        if name not in _built(folder):
            return Response(status_code=404)
        headers = {"Cache-Control": f"public, max-age={_YEAR_S}, immutable", "X-Content-Type-Options": "nosniff"}
        kind = "text/javascript" if name.endswith(".js") else None
        return FileResponse(folder / name, media_type=kind, headers=headers)

    return Route("/medseg/static/{file}", static, methods=["GET"])


def run(app: App, settings: Settings) -> None:
    """Serve the application until the process is stopped."""
    options: dict[str, Any] = {
        "browser.gatherUsageStats": False,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "viewer",
        "logger.hideWelcomeMessage": True,
        "server.address": settings.host,
        "server.fileWatcherType": "none",
        "server.headless": True,
        "server.maxUploadSize": 1,  # scans go to the disk by a route of ours; Streamlit's keeps them in memory
        "server.port": settings.port,
        "theme.base": "dark",
        "theme.primaryColor": "#3d7ebf",
    }
    if settings.login is not None:
        options["secrets.files"] = [str(settings.login.file)]
    app.run(config=options)


def _built(folder: Path) -> set[str]:
    """Names of the files that may be served."""
    try:
        return set(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError):
        return set()
