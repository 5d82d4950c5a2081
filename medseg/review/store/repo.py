"""Reading and writing the review store: one method, one transaction.

Nothing here touches a mask's bytes: files are written before their row (`medseg.review.saving`), so that a row always
names a complete file, and a file without a row is nobody's loss.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from sqlalchemy import ColumnElement, Engine, Select, func, select, text, update
from sqlalchemy.orm import Session

from medseg.errors import InputError, UsageError
from medseg.review.store.engine import open_database
from medseg.review.store.models import (
    Audit,
    Base,
    Case,
    Job,
    JobState,
    Label,
    Mask,
    Prediction,
    Review,
    Role,
    State,
    User,
    Verdict,
    new_id,
    now,
)

Row = TypeVar("Row", bound=Base)

BANNER = "Research use only. Not a medical device."
"""On every page and in every export."""

GENESIS = "0" * 64
"""`Audit.prev_hash` of the first line."""

UNREVIEWED: tuple[State, ...] = ("new", "in review")

_RANK: Mapping[str, int] = {"reader": 0, "reviewer": 1, "admin": 2}
_CHAIN_LOCK = 0x6D656175
_TRAIL_PAGE = 1000
_COVERED = ("at", "user", "action", "case", "revision", "detail")


@dataclass(frozen=True)
class NewMask:
    """A mask file that is complete on disk and waits for its row.

    Attributes:
        id: the row's.
        path: the file.
        sha256: of its bytes.
        changed_voxels: against the version that its author started from.
    """

    id: str
    path: Path
    sha256: str
    changed_voxels: int


@dataclass(frozen=True)
class Saved:
    """A version was added."""

    mask: Mask


@dataclass(frozen=True)
class Conflict:
    """Somebody else was first.

    Attributes:
        yours: the revision that the author started from.
        theirs: the current one.
        by: who made the current one.
        at: when, ISO 8601.
        draft_id: the mask row under which the second save is kept; "" where there was no mask to keep.
    """

    yours: int
    theirs: int
    by: str
    at: str
    draft_id: str


@dataclass(frozen=True)
class WorklistRow:
    """A line of the worklist.

    Attributes:
        case: the case.
        model: of the newest prediction, "" without one.
        reviewer: who signed last, or to whom it is assigned; "".
    """

    case: Case
    model: str
    reviewer: str


@dataclass(frozen=True)
class TrailCheck:
    """What checking the audit trail found.

    Attributes:
        lines: how many there are.
        head: hash of the last line. Who keeps a copy elsewhere can prove later that nothing was cut off the end.
        broken_at: number of the first line that does not follow from those before it; None when all do.
    """

    lines: int
    head: str
    broken_at: int | None


class Store:
    """The review store.

    Args:
        url: of the database, see `open_database`.
        folder: the data folder; paths inside it are stored relative to it, so that it can move.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.folder = folder.absolute()
        self.engine: Engine = open_database(url)
        self._reader = self.engine.execution_options(read=True)
        # SQLite's own waiting is not in order of arrival: of twenty who save at once, one would wait for seconds.
        sqlite = self.engine.dialect.name == "sqlite"
        self._turn: AbstractContextManager[Any] = threading.Lock() if sqlite else nullcontext()

    @classmethod
    def in_folder(cls, folder: Path) -> Store:
        """The store of a data folder with its SQLite database, both made when missing.

        Raises:
            InputError: the folder cannot be made, or the database cannot be used.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as err:
            raise InputError(folder, f"cannot be made ({err.strerror or err})", "choose another folder") from err
        return cls(f"sqlite:///{folder.absolute() / 'review.sqlite'}", folder)

    def close(self) -> None:
        """Give back all connections."""
        self.engine.dispose()

    def file(self, stored: str) -> Path:
        """The place of a stored path."""
        return self.folder / stored

    # --- people ---------------------------------------------------------------------------------------------------

    def sign_in(self, subject: str, display_name: str, *, role: Role = "reviewer") -> User:
        """The user of a login, made on the first visit; an existing user keeps the role.

        Args:
            subject: what the login vouches for, or ``local:<name>``.
            display_name: the name on verdicts.
            role: of a new user.
        """
        with self._writing() as session:
            user = session.scalar(select(User).where(User.subject == subject))
            if user is None:
                user = User(id=new_id(), subject=subject, display_name=display_name, role=role)
                session.add(user)
                session.flush()
                # Users may be renamed; the trail keeps whom the login vouched for.
                _log(session, user.id, "user_added", detail={"role": role, "subject": subject})
            return user

    def set_role(self, user_id: str, role: Role, *, by: User) -> None:
        """Change what a user may do; for administrators.

        Raises:
            PermissionError: `by` is no administrator.
            InputError: no such user.
        """
        if role not in get_args(Role):
            raise ValueError(f"unknown role {role!r}")
        with self._writing() as session:
            _allow(session, by, "admin")
            user = _found(session.get(User, user_id), "user")
            user.role = role
            _log(session, by.id, "role_set", detail={"user": user_id, "role": role})

    def user(self, user_id: str) -> User:
        """A user.

        Raises:
            InputError: no such user.
        """
        with self._reading() as session:
            return _found(session.get(User, user_id), "user")

    def users(self) -> list[User]:
        """All users by name."""
        return self._all(select(User).order_by(User.display_name, User.id))

    # --- cases ----------------------------------------------------------------------------------------------------

    def add_case(
        self,
        case_id: str,
        *,
        name: str,
        image: Path,
        image_sha256: str,
        sources: Sequence[Path],
        grid: Path,
        shape: Sequence[int],
        spacing: Sequence[float],
        modality: str,
        by: User,
        reference: Path | None = None,
    ) -> Case:
        """Add a case; its files are there already.

        Raises:
            PermissionError: a reader may not.
        """
        case = Case(
            id=case_id,
            name=name,
            image_path=self._stored(image),
            image_sha256=image_sha256,
            sources=[self._stored(path) for path in sources],
            grid_path=self._stored(grid),
            reference_path=self._stored(reference) if reference is not None else "",
            shape=list(shape),
            spacing=list(spacing),
            modality=modality,
        )
        with self._writing() as session:
            _allow(session, by, "reviewer")
            session.add(case)
            session.flush()
            _log(session, by.id, "case_added", case_id, 0, {"image_sha256": image_sha256})
        return case

    def case(self, case_id: str) -> Case:
        """A case.

        Raises:
            InputError: no such case.
        """
        with self._reading() as session:
            return _found(session.get(Case, case_id), "case")

    def case_of_image(self, image_sha256: str) -> Case | None:
        """The oldest case with an image of these bytes."""
        query = select(Case).where(Case.image_sha256 == image_sha256).order_by(Case.created_at, Case.id)
        found: list[Case] = self._all(query.limit(1))
        return found[0] if found else None

    def set_reference(self, case_id: str, file: Path, sha256: str, *, by: User) -> None:
        """Name a case's reference label map; the file is there already, an earlier one stays on disk.

        Raises:
            PermissionError: a reader may not. InputError: no such case.
        """
        with self._writing() as session:
            _allow(session, by, "reviewer")
            case = _found(session.get(Case, case_id), "case")
            case.reference_path = self._stored(file)
            _log(session, by.id, "reference_set", case_id, case.revision, {"sha256": sha256})

    def assign(self, case_id: str, user_id: str | None, *, by: User) -> None:
        """Give a case to somebody, or to nobody.

        Raises:
            PermissionError: a reader may not. InputError: no such case or user.
        """
        with self._writing() as session:
            _allow(session, by, "reviewer")
            case = _found(session.get(Case, case_id), "case")
            if user_id is not None:
                _found(session.get(User, user_id), "user")
            case.assigned_to = user_id
            _log(session, by.id, "assigned", case_id, case.revision, {"to": user_id})

    def worklist(
        self, *, state: State | None = None, model: str | None = None, reviewer: str | None = None, search: str = ""
    ) -> list[WorklistRow]:
        """The cases, oldest first.

        Args:
            state: only cases in this state.
            model: only cases whose newest prediction is of this model.
            reviewer: only cases of this reviewer's name.
            search: a piece of the case's name, in any case.
        """
        newest = (
            select(Prediction.model)
            .where(Prediction.case_id == Case.id)
            .order_by(Prediction.created_at.desc(), Prediction.id)
            .limit(1)
            .scalar_subquery()
        )
        signed = (
            select(Review.reviewer_name)
            .where(Review.case_id == Case.id)
            .order_by(Review.created_at.desc(), Review.id)
            .limit(1)
            .scalar_subquery()
        )
        assigned = select(User.display_name).where(User.id == Case.assigned_to).scalar_subquery()
        person = func.coalesce(signed, assigned, "")
        query = select(Case, func.coalesce(newest, ""), person).order_by(Case.created_at, Case.id)
        wanted: list[ColumnElement[bool]] = []
        if state is not None:
            wanted.append(Case.state == state)
        if model is not None:
            wanted.append(func.coalesce(newest, "") == model)
        if reviewer is not None:
            wanted.append(person == reviewer)
        if search:
            wanted.append(func.lower(Case.name).contains(search.lower(), autoescape=True))
        with self._reading() as session:
            return [WorklistRow(*row) for row in session.execute(query.where(*wanted))]

    def next_unreviewed(self, user: User, *, after: str | None = None) -> Case | None:
        """The next case without a verdict on its current version, round the list; cases of other people are left out.

        Args:
            user: cases assigned to this user or to nobody count.
            after: the case that is open now, which is not returned.
        """
        mine = (Case.assigned_to.is_(None)) | (Case.assigned_to == user.id)
        query = select(Case).where(Case.state.in_(UNREVIEWED), mine).order_by(Case.created_at, Case.id)
        found = [case for case in self._all(query) if case.id != after]
        if after is None or not found:
            return found[0] if found else None
        place = self.case(after)
        later = [case for case in found if (case.created_at, case.id) > (place.created_at, place.id)]
        return (later or found)[0]

    # --- labels and predictions -----------------------------------------------------------------------------------

    def labels(self, case_id: str) -> list[Label]:
        """The case's label table by value, background left out; empty before the first prediction."""
        return self._all(select(Label).where(Label.case_id == case_id).order_by(Label.value))

    def set_labels(self, case_id: str, labels: Sequence[Label], *, by: User) -> bool:
        """Give a case its label table, once; whether the case now has this very table.

        Raises:
            PermissionError: a reader may not. InputError: no such case.
        """
        with self._writing() as session:
            _allow(session, by, "reviewer")
            case = _found(session.get(Case, case_id, with_for_update=True), "case")
            there = session.scalars(select(Label).where(Label.case_id == case_id)).all()
            if there:
                return {row.value: row.name for row in there} == {row.value: row.name for row in labels}
            session.add_all(labels)
            _log(session, by.id, "labels_set", case_id, case.revision, {str(row.value): row.name for row in labels})
        return True

    def add_prediction(
        self,
        prediction: Prediction,
        *,
        mask: Path,
        uncertainty: Path | None,
        evidence: Path | None = None,
        phases: Mapping[str, Path] | None = None,
        by: User,
    ) -> Prediction:
        """Keep what a model made of a case; the files are there already.

        Raises:
            PermissionError: a reader may not. InputError: no such case.
        """
        prediction.mask_path = self._stored(mask)
        prediction.uncertainty_path = self._stored(uncertainty) if uncertainty is not None else ""
        prediction.evidence_path = self._stored(evidence) if evidence is not None else ""
        prediction.phase_paths = {name: self._stored(path) for name, path in (phases or {}).items()}
        with self._writing() as session:
            _allow(session, by, "reviewer")
            case = _found(session.get(Case, prediction.case_id), "case")
            session.add(prediction)
            session.flush()
            detail = {"model": prediction.model, "version": prediction.bundle_version, "sha256": prediction.mask_sha256}
            _log(session, by.id, "predicted", case.id, case.revision, detail)
        return prediction

    def prediction(self, prediction_id: str) -> Prediction:
        """A prediction.

        Raises:
            InputError: no such prediction.
        """
        with self._reading() as session:
            return _found(session.get(Prediction, prediction_id), "prediction")

    def predictions(self, case_id: str) -> list[Prediction]:
        """The case's predictions, newest first."""
        query = select(Prediction).where(Prediction.case_id == case_id)
        return self._all(query.order_by(Prediction.created_at.desc(), Prediction.id))

    def origin(self, case_id: str, revision: int) -> Prediction | None:
        """The prediction that a version was made from, by however many corrections; None for one drawn by hand.

        Raises:
            InputError: no such version.
        """
        versions = {version.revision: version for version in self.versions(case_id)}
        while revision > 0:
            version = _found(versions.get(revision), "version")
            if version.prediction_id is not None:
                return self.prediction(version.prediction_id)
            revision = version.base_revision if version.restored_from is None else version.restored_from
        return None

    # --- versions -------------------------------------------------------------------------------------------------

    def add_version(
        self,
        case_id: str,
        mask: NewMask,
        *,
        base_revision: int,
        by: User,
        prediction_id: str | None = None,
        restored_from: int | None = None,
        draft_id: str | None = None,
    ) -> Saved | Conflict:
        """Make a mask the current version, if the current one is still that which its author started from.

        Otherwise the mask is kept as a draft, and nothing else changes.

        Args:
            case_id: the case.
            mask: its file.
            base_revision: the version that its author started from; 0 is none.
            by: the author.
            prediction_id: the prediction that it equals.
            restored_from: the version that it brings back.
            draft_id: the draft that it settles.

        Raises:
            PermissionError: a reader may not. InputError: no such case, or no open draft of that name.
        """
        row = Mask(
            id=mask.id,
            case_id=case_id,
            revision=base_revision + 1,
            base_revision=base_revision,
            prediction_id=prediction_id,
            restored_from=restored_from,
            path=self._stored(mask.path),
            sha256=mask.sha256,
            author_id=by.id,
            changed_voxels=mask.changed_voxels,
            kind="saved",
        )
        with self._writing() as session:
            _allow(session, by, "reviewer")
            moved = session.execute(
                update(Case)
                .where(Case.id == case_id, Case.revision == base_revision)
                .values(revision=base_revision + 1, state="new" if prediction_id else "in review", changed_at=now())
            )
            if moved.rowcount == 1:  # type: ignore[attr-defined]
                session.add(row)
                detail: dict[str, Any] = {"sha256": mask.sha256, "changed_voxels": mask.changed_voxels}
                if prediction_id:
                    detail["prediction"] = prediction_id
                if restored_from is not None:
                    detail["restored_from"] = restored_from
                if draft_id is not None:
                    _settle(session, draft_id, case_id, "saved")
                    detail["draft"] = draft_id
                session.flush()
                _log(session, by.id, "saved", case_id, row.revision, detail)
                return Saved(row)
            case = _found(session.get(Case, case_id), "case")
            row.kind = "draft"
            session.add(row)
            session.flush()
            detail = {"draft": row.id, "sha256": mask.sha256, "yours": base_revision, "theirs": case.revision}
            if draft_id is not None:  # its drawing lives on in the new draft
                with suppress(InputError):
                    _settle(session, draft_id, case_id, "dropped")
                    detail["replaces"] = draft_id
            _log(session, by.id, "save_conflict", case_id, case.revision, detail)
            return _conflict(session, case, base_revision, row.id)

    def drop_draft(self, draft_id: str, *, by: User) -> None:
        """Close a draft without saving it; its file stays.

        Raises:
            PermissionError: only its author or an administrator may. InputError: no open draft of that name.
        """
        with self._writing() as session:
            draft = _found(session.get(Mask, draft_id), "draft")
            _allow(session, by, "reviewer" if draft.author_id == by.id else "admin")
            _settle(session, draft_id, draft.case_id, "dropped")
            _log(session, by.id, "draft_dropped", draft.case_id, None, {"draft": draft_id, "sha256": draft.sha256})

    def mask(self, mask_id: str) -> Mask:
        """A version or draft.

        Raises:
            InputError: no such mask.
        """
        with self._reading() as session:
            return _found(session.get(Mask, mask_id), "mask")

    def version(self, case_id: str, revision: int) -> Mask:
        """A version of a case.

        Raises:
            InputError: no such version.
        """
        query = select(Mask).where(Mask.case_id == case_id, Mask.revision == revision, Mask.kind == "saved")
        with self._reading() as session:
            return _found(session.scalar(query), "version")

    def versions(self, case_id: str) -> list[Mask]:
        """The case's versions, oldest first."""
        return self._all(select(Mask).where(Mask.case_id == case_id, Mask.kind == "saved").order_by(Mask.revision))

    def drafts(self, case_id: str) -> list[Mask]:
        """The case's open drafts, oldest first."""
        query = select(Mask).where(Mask.case_id == case_id, Mask.kind == "draft", Mask.settled == "")
        return self._all(query.order_by(Mask.created_at, Mask.id))

    # --- verdicts -------------------------------------------------------------------------------------------------

    def add_review(
        self, case_id: str, revision: int, verdict: Verdict, *, comment: str = "", by: User
    ) -> Review | Conflict:
        """Sign a verdict on the current version; `Conflict` when another version is current by now.

        Raises:
            PermissionError: a reader may not.
            UsageError: no version to judge, or no comment where one is needed.
            InputError: no such case.
        """
        if verdict not in get_args(Verdict):
            raise ValueError(f"unknown verdict {verdict!r}")
        comment = comment.strip()
        if verdict != "accepted" and not comment:
            raise UsageError("verdict", f"{verdict!r} without a comment", "say what is wrong")
        if revision < 1:
            raise UsageError("verdict", "the case has no segmentation yet", "run a model or draw one first")
        with self._writing() as session:
            person = _allow(session, by, "reviewer")
            moved = session.execute(
                update(Case)
                .where(Case.id == case_id, Case.revision == revision)
                .values(state=verdict, changed_at=now())
            )
            if moved.rowcount != 1:  # type: ignore[attr-defined]
                return _conflict(session, _found(session.get(Case, case_id), "case"), revision, "")
            mask = session.scalars(
                select(Mask).where(Mask.case_id == case_id, Mask.revision == revision, Mask.kind == "saved")
            ).one()
            review = Review(
                id=new_id(),
                case_id=case_id,
                revision=revision,
                mask_sha256=mask.sha256,
                reviewer_id=person.id,
                reviewer_name=person.display_name,
                verdict=verdict,
                comment=comment,
                created_at=now(),
            )
            session.add(review)
            session.flush()
            # The comment may hold anything: the trail proves it without repeating it.
            told = hashlib.sha256(comment.encode()).hexdigest()
            detail = {"verdict": verdict, "sha256": mask.sha256, "comment_sha256": told, "review": review.id}
            _log(session, by.id, "signed", case_id, revision, detail)
            return review

    def reviews(self, case_id: str) -> list[Review]:
        """The case's verdicts, oldest first."""
        return self._all(select(Review).where(Review.case_id == case_id).order_by(Review.created_at, Review.id))

    # --- jobs -----------------------------------------------------------------------------------------------------

    def add_job(self, case_id: str, bundle: str, options: Mapping[str, Any], *, most: int, by: User) -> Job:
        """Queue a run.

        Args:
            case_id: the case.
            bundle: name of the bundle.
            options: for the worker.
            most: how many jobs may wait.
            by: who asks.

        Raises:
            PermissionError: a reader may not. InputError: no such case. UsageError: the queue is full.
        """
        with self._writing() as session:
            _allow(session, by, "reviewer")
            _found(session.get(Case, case_id), "case")
            _lock_chain(session)
            waiting = session.scalar(select(func.count()).where(Job.state == "queued")) or 0
            if waiting >= most:
                raise UsageError("queue", f"{waiting} runs are waiting already", "try again when some are done")
            number = (session.scalar(select(func.max(Job.number))) or 0) + 1
            job = Job(
                id=new_id(), number=number, case_id=case_id, bundle=bundle, options=dict(options), created_by=by.id
            )
            session.add(job)
            session.flush()
            _log(session, by.id, "job_added", case_id, None, {"job": job.id, "bundle": bundle})
            return job

    def job(self, job_id: str) -> Job:
        """A job.

        Raises:
            InputError: no such job.
        """
        with self._reading() as session:
            return _found(session.get(Job, job_id), "job")

    def jobs(self, *, state: JobState | None = None, case_id: str | None = None) -> list[Job]:
        """Jobs in the order of arrival."""
        query = select(Job).order_by(Job.number)
        if state is not None:
            query = query.where(Job.state == state)
        if case_id is not None:
            query = query.where(Job.case_id == case_id)
        return self._all(query)

    def take_job(self, worker: str) -> Job | None:
        """The first waiting job, now this worker's."""
        first = select(Job).where(Job.state == "queued").order_by(Job.number).limit(1)
        with self._writing() as session:
            job = session.scalar(first.with_for_update(skip_locked=True))
            if job is not None:
                job.state, job.worker, job.started_at = "running", worker, now()
            return job

    def note_progress(self, job_id: str, progress: float, message: str) -> bool:
        """Keep how far a job is; whether somebody asked to stop it."""
        with self._writing() as session:
            job = _found(session.get(Job, job_id), "job")
            job.progress, job.message = progress, message
            return job.cancel

    def end_job(
        self, job_id: str, state: JobState, *, message: str = "", code: int = 0, prediction_id: str | None = None
    ) -> None:
        """Close a job."""
        with self._writing() as session:
            job = _found(session.get(Job, job_id), "job")
            job.state, job.message, job.code, job.ended_at = state, message, code, now()
            job.prediction_id = prediction_id
            job.options = _without_patient(job.options)
            if state == "done":
                job.progress = 1.0
            _log(session, job.created_by, f"job_{state}", job.case_id, None, {"job": job_id, "code": code})

    def cancel_job(self, job_id: str, *, by: User) -> None:
        """Take a waiting job off the queue, or ask a running one to stop; nothing happens to one that has ended.

        Raises:
            PermissionError: only who asked for it or an administrator may. InputError: no such job.
        """
        with self._writing() as session:
            job = _found(session.get(Job, job_id, with_for_update=True), "job")
            _allow(session, by, "reviewer" if job.created_by == by.id else "admin")
            if job.state not in {"queued", "running"}:
                return
            job.cancel = True
            if job.state == "queued":
                job.state, job.ended_at, job.message = "cancelled", now(), "cancelled before it began"
                job.options = _without_patient(job.options)
            _log(session, by.id, "job_cancel", job.case_id, None, {"job": job_id})

    def end_lost_jobs(self, worker: str) -> int:
        """Mark as failed what this worker was running when it was stopped; how many."""
        query = select(Job).where(Job.state == "running", Job.worker == worker)
        lost: list[Job] = self._all(query)
        for job in lost:
            self.end_job(job.id, "failed", message="the app was stopped during the run; run it again", code=1)
        return len(lost)

    # --- audit trail ----------------------------------------------------------------------------------------------

    def note(self, by: User, action: str, *, case_id: str | None = None, detail: Mapping[str, Any]) -> None:
        """Add a line to the audit trail for what changes nothing here: an export, a download."""
        with self._writing() as session:
            _log(session, by.id, action, case_id, None, detail)

    def trail(self, *, case_id: str | None = None) -> Iterator[Audit]:
        """Lines of the audit trail, oldest first."""
        last = 0
        while True:
            query = select(Audit).where(Audit.id > last).order_by(Audit.id).limit(_TRAIL_PAGE)
            if case_id is not None:
                query = query.where(Audit.case_id == case_id)
            page: list[Audit] = self._all(query)
            if not page:
                return
            yield from page
            last = page[-1].id

    def check_trail(self) -> TrailCheck:
        """Follow the hashes from the first line to the last."""
        head, lines, broken = GENESIS, 0, None
        for line in self.trail():
            lines += 1
            if broken is None and (line.prev_hash != head or line.hash != _hash(line)):
                broken = lines
            head = line.hash
        return TrailCheck(lines, head, broken)

    def export_trail(self) -> Iterator[str]:
        """The audit trail as JSON lines, each with what its hash covers, so that others can check it too.

        The first line introduces the file. SHA-256 of the text of `prev_hash`, followed by the JSON object of at, user,
        action, case, revision and detail with sorted keys and no spaces, is `hash`; see `check_export`.
        """
        yield json.dumps({"disclaimer": BANNER, "exported": now().isoformat(timespec="seconds")}) + "\n"
        for line in self.trail():
            covered = json.loads(_canonical(line))
            yield json.dumps({"id": line.id, **covered, "prev_hash": line.prev_hash, "hash": line.hash}) + "\n"

    # --- inside ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        with self._turn, Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def _all(self, query: Select[Row]) -> list[Row]:
        with self._reading() as session:
            return list(session.scalars(query))

    def _stored(self, path: Path) -> str:
        path = path.absolute()
        return str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)


def check_export(lines: Iterable[str]) -> TrailCheck:
    """Follow the hashes of an exported trail, as anybody can who holds the file alone.

    Args:
        lines: of `Store.export_trail`; those without a hash introduce the file and are passed over.

    Raises:
        InputError: not such lines.
    """
    head, count, broken = GENESIS, 0, None
    try:
        for text_ in lines:
            line: dict[str, Any] = dict(json.loads(text_))
            if "hash" not in line:
                continue
            count += 1
            told = json.dumps({key: line[key] for key in _COVERED}, sort_keys=True, separators=(",", ":"))
            follows = hashlib.sha256((head + told).encode()).hexdigest()
            if broken is None and (line["prev_hash"], line["hash"]) != (head, follows):
                broken = count
            head = line["hash"]
    except (ValueError, KeyError, TypeError) as err:
        raise InputError("audit trail", "not lines of an exported trail", "export it again") from err
    return TrailCheck(count, head, broken)


def _found(row: Row | None, kind: str) -> Row:
    if row is None:
        raise InputError(kind, "no such " + kind, "reload the list")
    return row


def _allow(session: Session, user: User, role: Role) -> User:
    """Read the user again and compare roles: one that was taken away counts at once.

    Raises:
        PermissionError: the user is unknown or may not.
    """
    person = session.get(User, user.id)
    if person is None or _RANK[person.role] < _RANK[role]:
        held = person.role if person else "nobody"
        raise PermissionError(f"the role {held} may not do this; ask an administrator for the role {role}")
    return person


def _settle(session: Session, draft_id: str, case_id: str, how: str) -> None:
    """Close a draft.

    Raises:
        InputError: it is not an open draft of this case.
    """
    closed = session.execute(
        update(Mask)
        .where(Mask.id == draft_id, Mask.case_id == case_id, Mask.kind == "draft", Mask.settled == "")
        .values(settled=how)
    )
    if closed.rowcount != 1:  # type: ignore[attr-defined]
        raise InputError("draft", "no such open draft", "reload the case")


def _conflict(session: Session, case: Case, yours: int, draft_id: str) -> Conflict:
    """Who was first, and when."""
    row = session.execute(
        select(User.display_name, Mask.created_at)
        .join(Mask, Mask.author_id == User.id)
        .where(Mask.case_id == case.id, Mask.revision == case.revision, Mask.kind == "saved")
    ).first()
    by, at = (row[0], row[1].isoformat(timespec="seconds")) if row else ("", "")
    return Conflict(yours, case.revision, by, at, draft_id)


def _without_patient(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that has ended: age and sex are known no longer than they are needed."""
    return {name: value for name, value in options.items() if name != "patient"}


def _lock_chain(session: Session) -> None:
    """Let one transaction at a time add to the trail; SQLite has one writer anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT pg_advisory_xact_lock({_CHAIN_LOCK})"))


def _log(
    session: Session,
    user_id: str,
    action: str,
    case_id: str | None = None,
    revision: int | None = None,
    detail: Mapping[str, Any] | None = None,
) -> None:
    """Add a line to the audit trail; the last thing of its transaction, as others wait for it from here on."""
    _lock_chain(session)
    head = session.scalar(select(Audit.hash).order_by(Audit.id.desc()).limit(1)) or GENESIS
    line = Audit(
        at=now().isoformat(timespec="microseconds"),
        user_id=user_id,
        action=action,
        case_id=case_id,
        revision=revision,
        detail=json.dumps(detail or {}, sort_keys=True, separators=(",", ":")),
        prev_hash=head,
    )
    line.hash = _hash(line)
    session.add(line)
    session.flush()


def _canonical(line: Audit) -> str:
    """What a line's hash covers, in one spelling."""
    covered = {
        "at": line.at,
        "user": line.user_id,
        "action": line.action,
        "case": line.case_id,
        "revision": line.revision,
        "detail": json.loads(line.detail),
    }
    return json.dumps(covered, sort_keys=True, separators=(",", ":"))


def _hash(line: Audit) -> str:
    return hashlib.sha256((line.prev_hash + _canonical(line)).encode()).hexdigest()
