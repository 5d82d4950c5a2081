"""Tables of the review store. All times are UTC, all identifiers random UUIDs as text."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Role = Literal["reader", "reviewer", "admin"]
State = Literal["new", "in review", "accepted", "needs correction", "rejected"]
Verdict = Literal["accepted", "needs correction", "rejected"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]


def new_id() -> str:
    """A random identifier that says nothing about what it names."""
    return str(uuid.uuid4())


def now() -> datetime:
    """The time of the clock, UTC."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """A time with its zone in both engines; SQLite alone would forget it."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Store UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Give back UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _one_of(column: str, words: Any) -> CheckConstraint:
    listed = ", ".join(f"'{word}'" for word in get_args(words))
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class Base(DeclarativeBase):
    """Names every constraint, so that migrations can change them on both engines."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - as SQLAlchemy documents it
        datetime: UtcDateTime,
        dict[str, Any]: JSON,
        list[str]: JSON,
        list[int]: JSON,
        list[float]: JSON,
    }


class User(Base):
    """A person.

    Attributes:
        subject: what the login vouches for, or ``local:<name>`` where there is no login.
    """

    __tablename__ = "users"
    __table_args__ = (_one_of("role", Role),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    subject: Mapped[str] = mapped_column(Text, unique=True)
    display_name: Mapped[str] = mapped_column(Text)
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(default=now)


class Case(Base):
    """A scan to review.

    Attributes:
        name: pseudonym shown on the screen.
        image_path: NIfTI (X, Y, Z) that viewer and exports read.
        image_sha256: of that file's bytes.
        sources: the files that a bundle takes, one for each channel; a DICOM folder or archive is one.
        grid_path: an empty label map on the image's grid: the header that every version copies.
        reference_path: label map to compare with, or "".
        shape: (X, Y, Z).
        spacing: mm along the array's axes.
        revision: of the current version, 0 before the first; the optimistic lock.
    """

    __tablename__ = "cases"
    __table_args__ = (_one_of("state", State),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(Text)
    image_path: Mapped[str] = mapped_column(Text)
    image_sha256: Mapped[str] = mapped_column(String(64), index=True)
    sources: Mapped[list[str]]
    grid_path: Mapped[str] = mapped_column(Text)
    reference_path: Mapped[str] = mapped_column(Text, default="")
    shape: Mapped[list[int]]
    spacing: Mapped[list[float]]
    modality: Mapped[str] = mapped_column(String(16), default="")
    state: Mapped[str] = mapped_column(String(16), default="new")
    revision: Mapped[int] = mapped_column(default=0)
    assigned_to: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime] = mapped_column(default=now)
    changed_at: Mapped[datetime] = mapped_column(default=now)


class Label(Base):
    """A row of a case's label table.

    Attributes:
        value: in the files.
        screen_value: in the viewer, whose drawings hold 1 to 255.
    """

    __tablename__ = "labels"

    case_id: Mapped[str] = mapped_column(ForeignKey("cases.id"), primary_key=True)
    value: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(Text)
    r: Mapped[int]
    g: Mapped[int]
    b: Mapped[int]
    screen_value: Mapped[int]


class Prediction(Base):
    """What a model made of a case.

    Attributes:
        labels: value (as text) to name.
        record: the run's record, as its JSON file holds it.
        evidence_path: where a diagnosis sees its evidence, or "".
        phase_paths: name of a phase to its image on the case's grid, as the network saw it; empty for one phase.
    """

    __tablename__ = "predictions"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    case_id: Mapped[str] = mapped_column(ForeignKey("cases.id"), index=True)
    model: Mapped[str] = mapped_column(Text)
    bundle_version: Mapped[str] = mapped_column(Text)
    mask_path: Mapped[str] = mapped_column(Text)
    mask_sha256: Mapped[str] = mapped_column(String(64))
    uncertainty_path: Mapped[str] = mapped_column(Text, default="")
    evidence_path: Mapped[str] = mapped_column(Text, default="", server_default="")
    phase_paths: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    labels: Mapped[dict[str, Any]]
    record: Mapped[dict[str, Any]]
    runtime_s: Mapped[float | None]
    device: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime] = mapped_column(default=now)


class Mask(Base):
    """A version of a case's segmentation, or a draft: a save that came second.

    Attributes:
        revision: of a saved version; of a draft the one that it would have had.
        base_revision: what its author had before the eyes.
        prediction_id: the prediction that it equals, for a version that a model made.
        restored_from: the revision that it brings back, or None.
        changed_voxels: against the version of `base_revision`.
        settled: of a draft: "" while open, else "saved" or "dropped".
    """

    __tablename__ = "masks"
    __table_args__ = (
        CheckConstraint("kind IN ('saved', 'draft')", name="kind"),
        CheckConstraint("settled IN ('', 'saved', 'dropped')", name="settled"),
        Index(
            "uq_masks_saved_revision",
            "case_id",
            "revision",
            unique=True,
            sqlite_where=text("kind = 'saved'"),
            postgresql_where=text("kind = 'saved'"),
        ),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    case_id: Mapped[str] = mapped_column(ForeignKey("cases.id"), index=True)
    revision: Mapped[int]
    base_revision: Mapped[int]
    prediction_id: Mapped[str | None] = mapped_column(ForeignKey("predictions.id"))
    restored_from: Mapped[int | None]
    path: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    author_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime] = mapped_column(default=now)
    changed_voxels: Mapped[int]
    kind: Mapped[str] = mapped_column(String(8))
    settled: Mapped[str] = mapped_column(String(8), default="")


class Review(Base):
    """A signed verdict on one version; never changed, a second thought is a second row.

    Attributes:
        reviewer_name: as it stood when the verdict was signed.
        mask_sha256: of the version's file.
    """

    __tablename__ = "reviews"
    __table_args__ = (_one_of("verdict", Verdict),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    case_id: Mapped[str] = mapped_column(ForeignKey("cases.id"), index=True)
    revision: Mapped[int]
    mask_sha256: Mapped[str] = mapped_column(String(64))
    reviewer_id: Mapped[str] = mapped_column(ForeignKey("users.id"))
    reviewer_name: Mapped[str] = mapped_column(Text)
    verdict: Mapped[str] = mapped_column(String(16))
    comment: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=now)


class Audit(Base):
    """One line of the audit trail.

    Attributes:
        at: UTC, ISO 8601 with microseconds: text, as the hash covers its letters.
        user_id: who; not a foreign key, as a line outlives everything.
        detail: JSON text in canonical form.
        prev_hash: `hash` of the line before, 64 zeros for the first.
        hash: SHA-256 of `prev_hash` and the canonical JSON of the other columns.
    """

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[str] = mapped_column(String(32))
    user_id: Mapped[str] = mapped_column(String(36))
    action: Mapped[str] = mapped_column(String(32))
    case_id: Mapped[str | None] = mapped_column(String(36), index=True)
    revision: Mapped[int | None]
    detail: Mapped[str] = mapped_column(Text)
    prev_hash: Mapped[str] = mapped_column(String(64), unique=True)
    hash: Mapped[str] = mapped_column(String(64))


class Job(Base):
    """A run of a bundle on a case.

    Attributes:
        number: place in the order of arrival.
        worker: who runs it, "" before.
        progress: 0 to 1.
        message: the stage, or the failure in one line.
        cancel: whether somebody asked to stop it.
        code: exit code that the command line would end with.
    """

    __tablename__ = "jobs"
    __table_args__ = (_one_of("state", JobState),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    number: Mapped[int] = mapped_column(unique=True)
    case_id: Mapped[str] = mapped_column(ForeignKey("cases.id"))
    bundle: Mapped[str] = mapped_column(Text)
    options: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16), default="queued", index=True)
    worker: Mapped[str] = mapped_column(Text, default="")
    progress: Mapped[float] = mapped_column(default=0.0)
    message: Mapped[str] = mapped_column(Text, default="")
    code: Mapped[int] = mapped_column(default=0)
    cancel: Mapped[bool] = mapped_column(Boolean, default=False)
    prediction_id: Mapped[str | None] = mapped_column(ForeignKey("predictions.id"))
    created_by: Mapped[str] = mapped_column(ForeignKey("users.id"))
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
