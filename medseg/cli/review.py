"""``medseg review``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer


def review(
    scans: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of scans, and outputs of medseg batch, that become cases; they stay as they are."),
    ] = None,
    *,
    data: Annotated[
        Path, typer.Option(help="Data folder: versions, verdicts, uploads; scans that lie in it become cases, too.")
    ] = Path("review"),
    database: Annotated[
        str,
        typer.Option(help="postgresql://USER@HOST/NAME, or sqlite:///FILE.", show_default="SQLite in the data folder"),
    ] = "",
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine's need --login.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8501,
    login: Annotated[
        Path | None,
        typer.Option(help="TOML file with the OpenID Connect client and roles, see docs/review.md; without: no login."),
    ] = None,
    upload_mb: Annotated[int, typer.Option(min=1, help="Largest upload, in MB.")] = 2048,
) -> None:
    """Open the page on which segmentations are seen, corrected, judged and signed. Research use only.

    Nothing leaves the data folder, and no version is ever overwritten. The key that signs links to voxels is random
    for each start, or MEDSEG_REVIEW_KEY (32 bytes or more) when several processes serve one data folder.

    To try:

    - medseg review scans --data review
    - medseg review --data scans --port 8600
    - medseg review scans batch_output --data review --database postgresql://medseg@db/review

    Exit codes: 0 stopped, 2 usage or a port that is taken, 3 a folder or settings that cannot be read, 6 data folder,
    8 not installed.
    """
    from medseg.errors import DeviceError, InputError, Interrupted

    try:
        from medseg.review.server import build_app, check_port, run
        from medseg.review.settings import Settings, read_login
    except ImportError as err:
        raise DeviceError("review page", f"{err.name} is not installed", "pip install 'medseg[app]'") from err
    for folder in scans or []:
        if not folder.is_dir():
            raise InputError(folder, "is no folder", "give folders of scans")
    settings = Settings(
        data=data,
        database=database,
        scans=tuple(scans or ()),
        host=host,
        port=port,
        upload_mb=upload_mb,
        login=None if login is None else read_login(login),
        test=os.environ.get("MEDSEG_REVIEW_TEST") == "1",
        **({"key": key.encode()} if (key := os.environ.get("MEDSEG_REVIEW_KEY")) else {}),
    )
    check_port(host, port)
    app = build_app(settings)
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (data in {data}; Ctrl+C stops)", flush=True)
    with contextlib.suppress(Interrupted):  # the way to stop a server is no failure
        run(app, settings)
