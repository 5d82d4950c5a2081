"""``medseg label serve``: MONAI Label's own server in a process of its own, with medseg's app in it."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata, resources, util
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medseg.bundles.locate import find_bundle
from medseg.errors import BundleError, DeviceError, InputError, MedsegError, OutputError, UsageError
from medseg.label.catalogue import Catalogue, ready_bundles

_START_S = 600.0
_STOP_S = 15.0
# MONAI Label's lines about requests name images and whatever else a client sent; errors without that are kept.
_LOGGING: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"level": "WARNING", "handlers": ["console"]},
    "loggers": {
        "medseg.label": {"level": "INFO"},
        "monailabel": {"level": "ERROR"},
        "task_train": {"level": "ERROR"},
        "task_scoring": {"level": "ERROR"},
        "task_batch_infer": {"level": "ERROR"},
        "uvicorn": {"level": "WARNING"},
        "uvicorn.access": {"level": "ERROR"},
        "timeloop": {"level": "ERROR"},
    },
}
# With it MONAI Label 0.8.5 does not start: it cannot print the addresses. --origin is in its place.
_UNSET = ("MONAI_LABEL_CORS_ORIGINS",)
USERNAME, PASSWORD = "MONAI_LABEL_DICOMWEB_USERNAME", "MONAI_LABEL_DICOMWEB_PASSWORD"
"""Variables with the login for the DICOMweb server."""

PASSWORD_FILE = "MONAI_LABEL_DICOMWEB_PASSWORD_FILE"  # noqa: S105 - a name
"""Variable that names a file with the password."""

_LAUNCH = "import logging; from monailabel.main import Main; Main(loglevel=logging.ERROR).run()"


@dataclass(frozen=True)
class Service:
    """What is to be served, and to whom.

    Attributes:
        studies: folder of the images, into which the server writes labels and an index; or the address of a DICOMweb
            server.
        bundles: names or folders; none: every bundle that is ready.
        trained: folder that gets new versions.
        host: address to listen on.
        port: to listen on.
        origins: web pages, such as OHIF's, that may use the server from another address.
        backend: what computes networks on the CPU.
        score: score all images at the start and after each training.
    """

    studies: str | Path
    bundles: Sequence[str | Path]
    trained: Path
    host: str = "127.0.0.1"
    port: int = 8000
    origins: Sequence[str] = ()
    backend: str = "auto"
    score: bool = False

    @property
    def url(self) -> str:
        """Where a client of this machine finds it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host  # noqa: S104 - compared, not bound
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def serve(service: Service, environment: Mapping[str, str], ready: Callable[[str], None]) -> None:
    """Run the server until it is stopped by SIGINT or SIGTERM, which the caller turns into an exception.

    Args:
        service: what to serve.
        environment: variables of the server's process; MONAI_LABEL_AUTH_* configure its authentication.
        ready: told the names of the models once the server answers.

    Raises:
        DeviceError: MONAI Label is not installed. InputError: no studies folder, or no DICOMweb server.
        UsageError: the port is taken, or others could reach the server without authentication.
        BundleError: a bundle cannot be served. OutputError: a folder cannot be written to.
        MedsegError: the server ended by itself.
    """
    check_installed()
    environment = with_password(environment)
    _check_host(service.host, environment)
    if is_address(service.studies):
        _check_dicomweb(str(service.studies), login(environment))
    _check_folders(service)
    roots = [find_bundle(one) for one in service.bundles] or ready_bundles()
    models = list(Catalogue(roots, service.trained).served)
    if not models:
        raise BundleError("bundles", "none is ready to serve", "see medseg bundles list; or give --bundle FOLDER")
    _check_port(service.host, service.port)
    work = Path(tempfile.mkdtemp(prefix="medseg-label-"))  # 0700: uploads, sessions and results pass through it
    try:
        _run(service, work, _arguments(service, work, roots), server_environment(environment, work), ready)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_installed() -> None:
    """Refuse to go on without MONAI Label.

    Raises:
        DeviceError: it is not there.
    """
    try:
        metadata.version("monailabel")
    except metadata.PackageNotFoundError:
        raise DeviceError("MONAI Label", "is not installed", "run medseg label install") from None


def app_folder() -> Path:
    """Folder of the app: inside the installed package, or app/monailabel of a source checkout.

    Raises:
        OutputError: neither is there.
    """
    package = Path(str(resources.files("medseg")))
    for folder in (package / "_app" / "monailabel", package.parent / "app" / "monailabel"):
        if (folder / "main.py").is_file():
            return folder
    raise OutputError("MONAI Label app", "not found", "reinstall medseg")


def is_address(studies: str | Path) -> bool:
    """Whether studies are those of a DICOMweb server."""
    return str(studies).startswith(("http:", "https:"))


def login(environment: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and password for the DICOMweb server."""
    name, password = (str(environment.get(key) or "") for key in (USERNAME, PASSWORD))
    return (name, password) if name else None


def with_password(environment: Mapping[str, str]) -> Mapping[str, str]:
    """The variables, with the DICOMweb server's password from the file that one of them names.

    Raises:
        InputError: that file cannot be read.
    """
    if not environment.get(PASSWORD_FILE):
        return environment
    try:
        password = Path(environment[PASSWORD_FILE]).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as err:
        raise InputError(environment[PASSWORD_FILE], "no password can be read from it", f"see {PASSWORD_FILE}") from err
    return {**environment, PASSWORD: password}


def stand_ins() -> list[str]:
    """Folders for the Python path of the server: modules that it imports and that are not there or do not import."""
    compat = Path(__file__).parent / "_compat"
    return [str(compat / name) for name in ("pydicom_seg", "itk") if not _imports(name)]


def server_environment(environment: Mapping[str, str], work: Path) -> dict[str, str]:
    """Variables of the server's process: MONAI Label's settings, and folders that are its own."""
    path = [*stand_ins(), *([environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else [])]
    kept = {key: value for key, value in environment.items() if key not in _UNSET}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(path),
        "TMPDIR": str(work / "tmp"),
        "MONAI_LABEL_SESSION_PATH": str(work / "sessions"),
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        "MONAI_LABEL_DATASTORE": "",
        "MONAI_LABEL_INFER_CONCURRENCY": "-1",
    }


def _imports(name: str) -> bool:
    if util.find_spec(name) is None:
        return False
    try:
        __import__(name)
    except Exception:
        return False
    return True


def _arguments(service: Service, work: Path, roots: Sequence[Path]) -> list[str]:
    """The server's command line, its folders made."""
    for name in ("app", "tmp", "sessions", "empty", "fetched"):
        (work / name).mkdir()
    shutil.copy(app_folder() / "main.py", work / "app" / "main.py")
    (work / "logging.json").write_text(json.dumps(_LOGGING), encoding="utf-8")
    names = [] if _is_local(service.host) is False else ["127.0.0.1", "localhost", "::1", service.host]
    conf = {
        "bundles": json.dumps([str(root.resolve()) for root in roots]),
        "trained": str(service.trained.resolve()),
        "backend": service.backend,
        "score": "true" if service.score else "false",
        "hosts": json.dumps(names),
        "origins": json.dumps(list(service.origins)),
        "fetched": str(work / "fetched"),
    }
    web = is_address(service.studies)
    studies = str(service.studies).rstrip("/") if web else str(Path(service.studies).resolve())
    # fmt: off
    return [
        sys.executable, "-c", _LAUNCH, "start_server",
        "--app", str(work / "app"), "--studies", studies,
        "--host", service.host, "--port", str(service.port),
        "--uvicorn_app", "medseg.label.server:app", "--log_config", str(work / "logging.json"),
        "--verbose", "WARNING", "--log_level", "warning",
        *(word for item in conf.items() for word in ("--conf", *item)),
    ]
    # fmt: on


def _run(
    service: Service,
    work: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    ready: Callable[[str], None],
) -> None:
    # In an empty folder: MONAI Label reads .env of the current one, and takes names of files in it for images.
    # In a session of its own, so that its training processes end with it.
    process = subprocess.Popen(  # noqa: S603
        arguments, env=dict(environment), cwd=work / "empty", stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + _START_S
        while not (models := _answer(service.url)):
            if (code := process.poll()) is not None:
                raise MedsegError("MONAI Label", f"ended with exit code {code} while starting", "see the lines above")
            if time.monotonic() > deadline:
                raise MedsegError("MONAI Label", f"does not answer after {_START_S:.0f} s", "see the lines above")
            time.sleep(0.3)
        ready(models)
        if code := process.wait():
            raise MedsegError("MONAI Label", f"ended with exit code {code}", "see the lines above")
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server with all its processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # uvicorn finishes what it is answering
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answer(url: str) -> str:
    """Names of the server's models once it answers; "needs a login" where it asks for one."""
    try:
        with urllib.request.urlopen(f"{url}/info/", timeout=10) as response:  # noqa: S310 - http, built here
            return ", ".join(json.load(response)["models"])
    except urllib.error.HTTPError as err:
        return "needs a login" if err.code in (401, 403) else ""
    except (OSError, ValueError, KeyError):
        return ""


def _check_host(host: str, environment: Mapping[str, str]) -> None:
    """Others may reach the server only if it asks who they are.

    Raises:
        UsageError: no address, or no authentication.
    """
    local = _is_local(host)
    if local is None:
        raise UsageError("--host", f"{host!r} is no address of this machine", "e.g. 127.0.0.1")
    enabled = environment.get("MONAI_LABEL_AUTH_ENABLE", "").lower() in ("true", "1", "yes", "on")
    if not local and not (enabled and environment.get("MONAI_LABEL_AUTH_REALM_URI")):
        problem = f"others can reach {host}, and no authentication is configured"
        raise UsageError(
            "--host", problem, "set MONAI_LABEL_AUTH_ENABLE and MONAI_LABEL_AUTH_REALM_URI, or leave it out"
        )


def _is_local(host: str) -> bool | None:
    """Whether only this machine reaches an address; None for none at all."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return None


def _check_dicomweb(url: str, known: tuple[str, str] | None) -> None:
    """A DICOMweb server answers there, and nobody on the way reads the password.

    Raises:
        UsageError: no such address, or one with a login in it. InputError: no answer, or none of a DICOMweb server.
    """
    parts = urlsplit(url)
    if parts.username is not None or parts.query or parts.fragment or not parts.hostname:
        remedy = f"e.g. http://127.0.0.1:8042/dicom-web; a login goes into {USERNAME} and {PASSWORD}"
        raise UsageError("--studies", "is no plain address of a DICOMweb server", remedy)
    if known and parts.scheme == "http" and not _is_local(parts.hostname):
        raise UsageError("--studies", "the password would cross the network in the clear", "use https")
    asked = urllib.request.Request(f"{url.rstrip('/')}/series?limit=1", headers={"Accept": "application/dicom+json"})  # noqa: S310 - http or https
    if known:
        asked.add_header("Authorization", "Basic " + base64.b64encode(":".join(known).encode()).decode())
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310
            json.loads(answer.read() or b"[]")
    except urllib.error.HTTPError as err:
        err.close()
        remedy = f"set {USERNAME} and {PASSWORD}" if err.code in (401, 403) else "e.g. http://127.0.0.1:8042/dicom-web"
        raise InputError(url, f"refuses the request for series (status {err.code})", remedy) from None
    except ValueError:
        raise InputError(url, "is no DICOMweb server", "e.g. http://127.0.0.1:8042/dicom-web") from None
    except OSError as err:
        reason = getattr(err, "reason", err)
        raise InputError(url, f"no DICOMweb server answers ({reason})", "start it, or check the address") from None


def _check_folders(service: Service) -> None:
    if not is_address(service.studies):
        if not Path(service.studies).is_dir():
            raise InputError(service.studies, "is no folder", "give the folder that holds the images")
        if not os.access(service.studies, os.W_OK | os.X_OK):
            raise OutputError(service.studies, "cannot be written to", "labels and an index are kept in it")
    try:
        service.trained.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(service.trained, f"cannot be made ({err.strerror})", "choose another --trained") from err
    for origin in service.origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path or parts.query:
            raise UsageError("--origin", f"{origin!r} is no origin of a web page", "e.g. http://localhost:3000")


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise UsageError("--port", f"{host}:{port} cannot be used ({err.strerror})", "choose another") from err
