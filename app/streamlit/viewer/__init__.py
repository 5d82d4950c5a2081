"""The viewer of the review page: a Streamlit component around NiiVue, and what page and viewer tell each other.

The page calls `viewer(spec, key=...)` on every run. The viewer keeps what the reviewer does: tool, window, zoom and
drawing belong to it, and a field of the spec takes effect when it differs from the run before. Voxels and masks travel
over HTTP (the URLs of the spec), never through the spec or the events.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STATIC = Path(__file__).parent / "static"
"""The built script with `manifest.json`: `{"entry": NAME, "files": [NAME, ...]}`; only these files may be served."""

STATIC_ROUTE = "/medseg/static"
"""Where `GET {STATIC_ROUTE}/{file}` answers with a file of the manifest, to be cached for ever: names carry a hash."""

Voxel = tuple[int, int, int]
Colour = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]
Layout = Literal["mpr+3d", "mpr", "axial", "coronal", "sagittal", "3d", "compare"]
ToolName = Literal["navigate", "brush", "eraser", "fill", "grow"]
Protect = Literal["all", "background", "visible"]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Image(_Spec):
    """The scan.

    Attributes:
        url: of a NIfTI file; masks are drawn and saved on its grid.
        name: ends in .nii or .nii.gz.
        preview_url: a copy averaged by 2 along each axis, shown until the full one has come. Its grid covers the same
            space; it is never drawn on.
        poster_url: a PNG shown until the first voxels have come.
        source: tells images of one case on one grid apart, e.g. phases; when it changes, the grey values alone do.
    """

    url: str
    name: str = Field(pattern=r"\.nii(\.gz)?$")
    source: str = ""
    preview_url: str | None = None
    poster_url: str | None = None


class Mask(_Spec):
    """A label map on the scan's grid, uint8.

    Attributes:
        url: of a NIfTI file.
        name: ends in .nii or .nii.gz.
        revision: the version it is, 0 for a model's output that nobody has saved.
        source: tells masks of one revision apart, e.g. a prediction's id; empty for a stored version.
        title: what the reviewer sees, e.g. "version 3".
    """

    url: str
    name: str = Field(pattern=r"\.nii(\.gz)?$")
    revision: int = Field(ge=0)
    source: str = ""
    title: str = ""


class Overlay(_Spec):
    """A further map on any grid, shown over the scan.

    Attributes:
        id: unique in the spec.
        url: of a NIfTI file.
        name: ends in .nii or .nii.gz.
        kind: "uncertainty" and "evidence" are maps of numbers, "compare" and "ground_truth" of labels (outlines over
            the drawing, in the colours of the spec's labels).
        title: what the reviewer sees.
        colormap: NiiVue's name, for maps of numbers.
        opacity: 0 to 1.
        range: values of the two ends of the colour map; lower ones are not shown.
        visible: shown from the start.
    """

    id: str
    url: str
    name: str = Field(pattern=r"\.nii(\.gz)?$")
    kind: Literal["compare", "uncertainty", "ground_truth", "evidence"]
    title: str = ""
    colormap: str = "inferno"
    opacity: float = Field(default=0.6, ge=0, le=1)
    range: tuple[float, float] = (0.1, 1.0)
    visible: bool = True


class Compare(_Spec):
    """Two label maps on the scan's grid, side by side with linked crosshairs; shown with `layout="compare"`.

    Attributes:
        first: shown on the left.
        second: shown on the right.
    """

    first: Mask
    second: Mask


class Label(_Spec):
    """A structure.

    Attributes:
        value: in the drawing.
        name: shown as text.
        rgb: colour.
        visible: shown from the start.
        locked: never painted over.
    """

    value: int = Field(ge=1, le=255)
    name: str
    rgb: Colour
    visible: bool = True
    locked: bool = False


class Lesion(_Spec):
    """A place to jump to with J and K.

    Attributes:
        id: as in the page's table.
        label: its structure.
        vox: index (i, j, k) in the file's order.
    """

    id: int
    label: int
    vox: Voxel


class Tool(_Spec):
    """The tool to start with.

    Attributes:
        name: which.
        label: what it paints; None for the first label.
        size: of the brush, voxels across.
        three_d: brush and region growing reach into neighbouring slices.
        threshold: paint only where the scan's value lies between these two, ends included; None for everywhere.
        protect: what a stroke leaves alone: nothing ("all" may be painted over), every label ("background" only) or
            hidden structures ("visible" only).
    """

    name: ToolName = "navigate"
    label: int | None = Field(default=None, ge=1, le=255)
    size: int = Field(default=5, ge=1, le=99)
    three_d: bool = False
    threshold: tuple[float, float] | None = None
    protect: Protect = "all"


class Save(_Spec):
    """Where an edited mask goes.

    The viewer sends `POST url` with the gzip of one byte a voxel, x fastest, in the order of the image file's axes, and
    the headers `If-Match` (revision of the mask that was loaded, or `revision`), `X-Medseg-Token`, and
    `X-Medseg-Draft` when a draft is saved again after a conflict. 200 answers `{revision, changed_voxels, sha256}`,
    409 `{yours, theirs, by, at, draft_id}`, anything else `{error}`.

    Attributes:
        url: absolute path on this server.
        token: signed claim.
        revision: version that the next save builds on when it is not the mask's, e.g. the current one while a model's
            output is shown.
        owner: random id of the reviewer: drafts in the browser are offered to this one only.
    """

    url: str
    token: str
    revision: int | None = Field(default=None, ge=0)
    owner: str = ""


class Screenshot(_Spec):
    """Where pictures of the canvas go: `POST url` with a PNG and the header `X-Medseg-Token`."""

    url: str
    token: str


class Command(_Spec):
    """Something to do once: when `id` differs from the last one that the viewer has carried out.

    Attributes:
        id: e.g. a counter in the session state.
        type: "goto" moves the crosshair to `vox`; "save" saves; "reset" returns zoom, pan and window to the start;
            "screenshot" sends a picture; "save_over" saves the drawing as the version after `revision` (after a
            conflict: theirs) and settles `draft_id`; "discard" drops unsaved changes and shows the spec's mask.
        vox: index (i, j, k) in the file's order, for "goto".
        revision: for "save_over".
        draft_id: for "save_over".
    """

    id: int
    type: Literal["goto", "save", "reset", "screenshot", "save_over", "discard"]
    vox: Voxel | None = None
    revision: int | None = None
    draft_id: str | None = None


class ViewerSpec(_Spec):
    """What is shown. JSON of it stays below 50 kB: it is sent whenever it changes.

    Attributes:
        case_id: a change loads everything anew; unsaved changes of the case before are kept as a draft in the browser.
        image: the scan; loaded once for a case.
        mask: what is shown and edited; None for an empty drawing. Loaded anew when revision or source change.
        overlays: further maps.
        compare: two masks for the layout "compare".
        window: centre and width in the scan's units; None for automatic.
        modality: "CT" offers presets in HU, "MR" ranges of the image.
        labels: the table; at most 255.
        lesions: places for J and K.
        opacity: of the drawing, 0 to 1.
        layout: hanging.
        radiological: patient's right on the left of the screen.
        tool: to start with.
        cmd: something to do once.
        save: None for read only.
        screenshot: None for no button.
        height: of the viewer, CSS.
        test: exposes `window.__medseg_test`; for tests only.
        bundle: URL of the script; filled in by `viewer`.
    """

    case_id: str
    image: Image
    mask: Mask | None = None
    overlays: tuple[Overlay, ...] = ()
    compare: Compare | None = None
    window: tuple[float, float] | None = None
    modality: Literal["CT", "MR"] = "CT"
    labels: tuple[Label, ...] = Field(default=(), max_length=255)
    lesions: tuple[Lesion, ...] = Field(default=(), max_length=500)
    opacity: float = Field(default=0.5, ge=0, le=1)
    layout: Layout = "mpr+3d"
    radiological: bool = True
    tool: Tool = Tool()
    cmd: Command | None = None
    save: Save | None = None
    screenshot: Screenshot | None = None
    height: str = "calc(100vh - 140px)"
    test: bool = False
    bundle: str = ""


class _Event(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Status(_Event):
    """How far loading is: "preview" shows the reduced copy, "ready" everything; `ms` since the case was asked for."""

    case_id: str
    phase: Literal["loading", "preview", "ready", "error"]
    message: str = ""
    ms: float = 0


class ToolState(_Event):
    """The tool in use."""

    name: ToolName
    label: int
    size: int


class Saved(_Event):
    """A version has been saved."""

    case_id: str
    revision: int
    changed_voxels: int
    sha256: str


class Conflict(_Event):
    """Somebody else saved first; mine lies on the server as a draft and is still in the viewer, unsaved."""

    case_id: str
    yours: int
    theirs: int
    by: str
    at: str
    draft_id: str


class Failed(_Event):
    """Something did not work; the drawing is as it was.

    Attributes:
        code: "bundle", "image", "mask", "overlay", "screenshot" or the HTTP status of a save, "network" without one.
    """

    case_id: str
    code: str
    message: str


class ScreenshotDone(_Event):
    """A picture has been sent; `id` is the command's, 0 for the button."""

    id: int


class Step(_Event):
    """The reviewer asked for the next (`by` = 1) or previous (-1) case; unsaved changes are dealt with."""

    case_id: str
    by: Literal[-1, 1]


class ViewerEvents(BaseModel):
    """What the viewer told since the last run.

    Attributes:
        status: kept between runs.
        dirty: there are unsaved changes; kept.
        window: centre and width, sent when it has been still for 0.3 s; kept.
        tool: kept.
        lesion: id that J or K jumped to last; kept.
        saved: present for one run only, like all below.
        conflict: see `Conflict`.
        failed: see `Failed`.
        screenshot: see `ScreenshotDone`.
        step: see `Step`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    status: Status | None = None
    dirty: bool = False
    window: tuple[float, float] | None = None
    tool: ToolState | None = None
    lesion: int | None = None
    saved: Saved | None = None
    conflict: Conflict | None = None
    failed: Failed | None = None
    screenshot: ScreenshotDone | None = None
    step: Step | None = None


_LOADER = """
export default function (c) {
  const root = c.parentElement.querySelector('.medseg-viewer')
  root.style.height = c.data.height
  let done = false, cleanup
  import(new URL(c.data.bundle, location.origin).href)
    .then(m => { if (!done) cleanup = m.default(c) })
    .catch(e => c.setTriggerValue('failed', { case_id: c.data.case_id, code: 'bundle', message: String(e) }))
  return () => { done = true; cleanup?.() }
}
"""

_HTML = '<div class="medseg-viewer" data-phase="loading"></div>'
_CSS = ".medseg-viewer{position:relative;min-height:320px;background:#000;overflow:hidden}"


def static_files() -> frozenset[str]:
    """Names that the static route may serve."""
    return frozenset(json.loads((STATIC / "manifest.json").read_text(encoding="utf-8"))["files"])


def bundle_url(base_path: str = "") -> str:
    """Path of the built script on this server.

    Args:
        base_path: Streamlit's `server.baseUrlPath`; own routes are to be mounted beneath it.
    """
    entry = json.loads((STATIC / "manifest.json").read_text(encoding="utf-8"))["entry"]
    prefix = base_path.strip("/")
    return f"{'/' + prefix if prefix else ''}{STATIC_ROUTE}/{entry}"


def viewer(spec: ViewerSpec, key: str) -> ViewerEvents:
    """Show a case.

    Args:
        spec: what to show.
        key: constant over runs; the viewer keeps its state for it.

    Returns:
        What the reviewer did since the last run; a value that does not fit the event's type is left out.
    """
    import streamlit as st

    data = spec.model_copy(update={"bundle": bundle_url(str(st.get_option("server.baseUrlPath") or ""))})
    result = _component()(
        key=key,
        data=data.model_dump(mode="json"),
        **{f"on_{name}_change": _nothing for name in ViewerEvents.model_fields},
    )
    return read_events(dict(result))


def read_events(values: dict[str, Any]) -> ViewerEvents:
    """Events from what the browser sent; a value of another type than the event's is left out."""
    from pydantic import ValidationError

    kept: dict[str, Any] = {}
    for name in ViewerEvents.model_fields:
        value = values.get(name)
        if value is None:
            continue
        try:
            kept[name] = getattr(ViewerEvents.model_validate({name: value}), name)
        except ValidationError:
            continue
    return ViewerEvents(**kept)


@cache
def _component() -> Any:  # Streamlit's type for it is not public
    import streamlit as st

    return st.components.v2.component("medseg_viewer", html=_HTML, css=_CSS, js=_LOADER, isolate_styles=True)


def _nothing() -> None:
    """Streamlit leaves out events without a callback."""
