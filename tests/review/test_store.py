"""The store on SQLite and PostgreSQL: nothing lost, nothing rewritten."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from medseg.errors import InputError, UsageError
from medseg.review.store.models import Base, Label, Prediction, new_id
from medseg.review.store.postgres import postgres_engine
from medseg.review.store.repo import Conflict, Saved, Store, check_export
from tests.review.conftest import add_case, new_mask


def test_migrations_make_the_tables_that_the_code_expects_and_run_once(store: Store, url: str, tmp_path: Path) -> None:
    Store(url, tmp_path).close()
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        if connection.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_processes_that_start_together_make_the_tables_once(url: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: Store(url, tmp_path), range(4)):
            assert found.check_trail().lines == 0
            found.close()


def test_a_database_of_a_newer_medseg_is_refused_and_left_alone(store: Store, url: str, tmp_path: Path) -> None:
    with store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InputError, match=r"made by a newer medseg \(schema 9999\); update medseg"):
        Store(url, tmp_path)
    with store.engine.begin() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "9999"


def test_a_file_that_is_no_database_is_one_line_without_password(tmp_path: Path) -> None:
    (tmp_path / "review.sqlite").write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(InputError, match="file is not a database"):
        Store.in_folder(tmp_path)
    with pytest.raises(InputError, match="cannot be used") as caught:
        Store("postgresql://me:secret@127.0.0.1:1/none", tmp_path)
    assert "secret" not in str(caught.value)
    for address in ("mysql://host/name", "sqlite://", "nonsense"):
        with pytest.raises(UsageError, match="postgresql://USER@HOST/NAME"):
            Store(address, tmp_path)


def test_postgresql_addresses_are_taken_as_its_own_programs_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {}

    class Told(Exception):  # noqa: N818 - the end of the way to the server
        pass

    def connection(**parameters: object) -> None:
        held.update(parameters)
        raise Told

    monkeypatch.setattr("medseg.review.store.postgres._socket", lambda *place: held.update(place=place) or MagicMock())
    monkeypatch.setattr("pg8000.dbapi.Connection", connection)
    (tmp_path / "pass").write_text("other:*:*:*:no\ndb:*:review:me:a\\:b\n")
    (tmp_path / "pass").chmod(0o600)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pass"))

    def ask(url: str) -> dict[str, object]:
        held.clear()
        with pytest.raises(Told):
            postgres_engine(make_url(url)).connect()
        return held

    assert ask("postgresql://me@db/review")["password"] == "a:b"  # noqa: S105
    assert held["place"] == ("db", 5432)
    assert held["ssl_context"] is None
    assert ask("postgresql://me:x@db:6000/review?sslmode=disable")["password"] == "x"  # noqa: S105
    assert (held["place"], held["ssl_context"]) == (("db", 6000), False)
    monkeypatch.setenv("PGPASSWORD", "secret")
    assert ask("postgresql://me@/review?host=/run/pg&port=5433")["place"] == ("/run/pg", 5433)
    assert held["password"] == "secret"  # noqa: S105
    for mode, checked, named in (("require", 0, False), ("verify-ca", 2, False), ("verify-full", 2, True)):
        context = ask(f"postgresql://me@db/review?sslmode={mode}")["ssl_context"]
        assert (context.verify_mode, context.check_hostname) == (checked, named)
    for query in ("sslmode=perhaps", "service=x", "sslmode=verify-full&sslrootcert=/none"):
        with pytest.raises(UsageError, match="database address"):
            postgres_engine(make_url(f"postgresql://me@db/review?{query}"))


def test_the_second_of_two_saves_is_kept_as_a_draft_and_can_be_saved_on_top(store: Store) -> None:
    anna, ben = store.sign_in("local:anna", "Anna"), store.sign_in("local:ben", "Ben")
    case = add_case(store, anna)
    first = store.add_version(case, new_mask(store, case), base_revision=0, by=anna)
    assert isinstance(first, Saved)
    second = new_mask(store, case)
    found = store.add_version(case, second, base_revision=0, by=ben)
    assert isinstance(found, Conflict)
    assert (found.yours, found.theirs, found.by, found.draft_id) == (0, 1, "Anna", second.id)
    assert [draft.sha256 for draft in store.drafts(case)] == [second.sha256]
    assert store.case(case).revision == 1

    on_top = store.add_version(case, new_mask(store, case), base_revision=1, by=ben, draft_id=second.id)
    assert isinstance(on_top, Saved)
    assert on_top.mask.revision == 2
    assert store.drafts(case) == []
    assert store.mask(second.id).settled == "saved"
    with pytest.raises(InputError, match="no such open draft"):
        store.drop_draft(second.id, by=ben)
    assert [line.action for line in store.trail(case_id=case)] == ["case_added", "saved", "save_conflict", "saved"]


def test_a_draft_that_comes_second_again_is_replaced_by_the_next(store: Store) -> None:
    anna, ben = store.sign_in("local:anna", "Anna"), store.sign_in("local:ben", "Ben")
    case = add_case(store, anna)
    masks = [new_mask(store, case) for _ in range(3)]
    store.add_version(case, new_mask(store, case), base_revision=0, by=anna)
    store.add_version(case, masks[0], base_revision=0, by=ben)
    store.add_version(case, new_mask(store, case), base_revision=1, by=anna)
    again = store.add_version(case, masks[1], base_revision=1, by=ben, draft_id=masks[0].id)
    assert isinstance(again, Conflict)
    assert [draft.id for draft in store.drafts(case)] == [masks[1].id]
    unknown = store.add_version(case, masks[2], base_revision=1, by=ben, draft_id=masks[0].id)
    assert isinstance(unknown, Conflict)
    assert {draft.id for draft in store.drafts(case)} == {masks[1].id, masks[2].id}


def test_many_reviewers_save_one_case_and_nothing_is_lost(store: Store, url: str, tmp_path: Path) -> None:
    reviewers, saves = 4, 6
    case = add_case(store, store.sign_in("local:admin", "Admin", role="admin"))
    begin = threading.Barrier(reviewers)

    def review(number: int) -> tuple[list[str], list[str]]:
        own = Store(url, tmp_path)  # connections of its own, as another process has
        user = own.sign_in(f"local:{number}", f"Reviewer {number}")
        saved, kept = [], []
        begin.wait()
        for _ in range(saves):
            mask = new_mask(own, case)
            base = own.case(case).revision
            found = own.add_version(case, mask, base_revision=base, by=user)
            while isinstance(found, Conflict):
                assert found.yours == base < found.theirs
                kept.append(found.draft_id)
                mask, base = new_mask(own, case), found.theirs
                found = own.add_version(case, mask, base_revision=base, by=user, draft_id=kept[-1])
            saved.append(mask.id)
        own.close()
        return saved, kept

    with ThreadPoolExecutor(reviewers) as pool:
        results = list(pool.map(review, range(reviewers)))
    saved = [mask for one, _ in results for mask in one]
    kept = [mask for _, one in results for mask in one]
    versions = store.versions(case)
    assert [version.revision for version in versions] == list(range(1, reviewers * saves + 1))
    assert {version.id for version in versions} == set(saved)
    assert all(store.mask(draft).kind == "draft" for draft in kept)
    actions = [line.action for line in store.trail(case_id=case)]
    assert actions.count("saved") == reviewers * saves
    assert actions.count("save_conflict") == len(kept)
    assert store.check_trail().broken_at is None


def test_the_database_itself_refuses_to_rewrite_history(store: Store) -> None:
    anna = store.sign_in("local:anna", "Anna")
    case = add_case(store, anna)
    store.add_version(case, new_mask(store, case), base_revision=0, by=anna)
    store.add_review(case, 1, "accepted", by=anna)
    for statement in (
        "UPDATE audit SET user_id = 'somebody'",
        "DELETE FROM audit",
        "UPDATE reviews SET verdict = 'rejected'",
        "DELETE FROM reviews",
        "UPDATE masks SET sha256 = ''",
        "DELETE FROM masks",
    ):
        with pytest.raises(DBAPIError, match="is append-only"), store.engine.begin() as connection:
            connection.execute(text(statement))


def test_a_line_changed_behind_the_databases_back_is_found_by_its_number(store: Store) -> None:
    anna = store.sign_in("local:anna", "Anna")
    case = add_case(store, anna)
    for _ in range(3):
        store.note(anna, "exported", case_id=case, detail={"kind": "pdf"})
    before = store.check_trail()
    assert (before.lines, before.broken_at) == (5, None)
    exported = list(store.export_trail())
    lines = [json.loads(line) for line in exported]
    assert "Research use only" in lines[0]["disclaimer"]
    assert [line["action"] for line in lines[3:]] == ["exported"] * 3
    assert lines[-1]["hash"] == before.head
    assert check_export(exported) == before
    forged = [line.replace("pdf", "csv") if number == 4 else line for number, line in enumerate(exported)]
    assert check_export(forged).broken_at == 4
    assert check_export([*exported[:2], *exported[3:]]).broken_at == 2
    with pytest.raises(InputError, match="not lines of an exported trail"):
        check_export(["[1]\n"])
    with store.engine.begin() as connection:  # as somebody who owns the database could
        if connection.dialect.name == "postgresql":
            connection.execute(text("ALTER TABLE audit DISABLE TRIGGER ALL"))
        else:
            connection.execute(text("DROP TRIGGER audit_no_update"))
        connection.execute(text("UPDATE audit SET user_id = 'somebody' WHERE id = 3"))
    assert store.check_trail().broken_at == 3


def test_a_verdict_stands_for_one_version_and_a_later_save_opens_the_case_again(store: Store) -> None:
    anna = store.sign_in("local:anna", "Anna")
    case = add_case(store, anna)
    with pytest.raises(UsageError, match="no segmentation yet"):
        store.add_review(case, 0, "accepted", by=anna)
    store.add_version(case, new_mask(store, case), base_revision=0, by=anna)
    with pytest.raises(UsageError, match="without a comment"):
        store.add_review(case, 1, "rejected", comment="  ", by=anna)
    store.add_review(case, 1, "accepted", by=anna)
    assert store.case(case).state == "accepted"
    store.add_version(case, new_mask(store, case), base_revision=1, by=anna)
    assert store.case(case).state == "in review"
    late = store.add_review(case, 1, "rejected", comment="too small", by=anna)
    assert isinstance(late, Conflict)
    assert late.theirs == 2
    assert [(review.revision, review.verdict) for review in store.reviews(case)] == [(1, "accepted")]
    assert not any("too small" in line.detail for line in store.trail())


def test_a_role_is_read_again_at_every_write(store: Store) -> None:
    admin = store.sign_in("local:admin", "Admin", role="admin")
    anna = store.sign_in("local:anna", "Anna")
    case = add_case(store, anna)
    store.set_role(anna.id, "reader", by=admin)
    assert anna.role == "reviewer"  # what the page still believes
    with pytest.raises(PermissionError, match="the role reader may not"):
        store.add_version(case, new_mask(store, case), base_revision=0, by=anna)
    with pytest.raises(PermissionError, match="reader"):
        store.add_review(case, 1, "accepted", by=anna)
    with pytest.raises(PermissionError, match="role admin"):
        store.set_role(anna.id, "admin", by=anna)
    assert store.sign_in("local:anna", "Anna", role="admin").role == "reader"


def test_the_worklist_filters_and_goes_round_the_unreviewed(store: Store) -> None:
    anna, ben = store.sign_in("local:anna", "Anna"), store.sign_in("local:ben", "Ben")
    cases = [add_case(store, anna, name) for name in ("Liver 1", "liver_2", "spleen 1")]
    made = Prediction(
        case_id=cases[1], model="organs", bundle_version="1", mask_sha256="", labels={}, record={}, runtime_s=1.5
    )
    store.add_prediction(made, mask=store.folder / "p.nii.gz", uncertainty=None, by=anna)
    store.add_version(cases[0], new_mask(store, cases[0]), base_revision=0, by=anna)
    store.add_review(cases[0], 1, "accepted", by=anna)
    store.assign(cases[2], ben.id, by=anna)
    names = [row.case.name for row in store.worklist(search="LIVER")]
    assert names == ["Liver 1", "liver_2"]
    assert [row.case.name for row in store.worklist(search="_")] == ["liver_2"]
    assert [row.case.id for row in store.worklist(state="accepted")] == [cases[0]]
    assert [row.case.id for row in store.worklist(model="organs")] == [cases[1]]
    assert [(row.case.id, row.reviewer) for row in store.worklist(reviewer="Ben")] == [(cases[2], "Ben")]
    for user, after, expected in ((anna, None, 1), (anna, cases[1], None), (ben, cases[1], 2), (ben, cases[2], 1)):
        found = store.next_unreviewed(user, after=after)
        assert (found and found.id) == (None if expected is None else cases[expected])


def test_a_label_table_is_set_once(store: Store) -> None:
    anna = store.sign_in("local:anna", "Anna")
    case = add_case(store, anna)

    def table(name: str) -> list[Label]:
        return [Label(case_id=case, value=1, name=name, r=1, g=2, b=3, screen_value=1)]

    assert store.set_labels(case, table("liver"), by=anna)
    assert store.set_labels(case, table("liver"), by=anna)
    assert not store.set_labels(case, table("spleen"), by=anna)
    assert [row.name for row in store.labels(case)] == ["liver"]


def test_jobs_run_in_order_and_lost_ones_are_told(store: Store) -> None:
    anna, ben = store.sign_in("local:anna", "Anna"), store.sign_in("local:ben", "Ben")
    case = add_case(store, anna)
    jobs = [store.add_job(case, "organs", {}, most=3, by=anna).id for _ in range(3)]
    with pytest.raises(UsageError, match="3 runs are waiting"):
        store.add_job(case, "organs", {}, most=3, by=anna)
    with pytest.raises(PermissionError):
        store.cancel_job(jobs[1], by=ben)
    store.cancel_job(jobs[1], by=anna)
    first = store.take_job("one")
    assert first is not None
    assert first.id == jobs[0]
    assert store.note_progress(first.id, 0.5, "network") is False
    store.cancel_job(first.id, by=anna)
    assert store.note_progress(first.id, 0.6, "network") is True
    last = store.take_job("one")
    assert last is not None
    assert last.id == jobs[2]
    assert store.take_job("one") is None
    assert store.end_lost_jobs("another") == 0
    assert store.end_lost_jobs("one") == 2
    assert [job.state for job in store.jobs()] == ["failed", "cancelled", "failed"]


def test_paths_inside_the_data_folder_move_with_it(store: Store, tmp_path: Path) -> None:
    anna = store.sign_in("local:anna", "Anna")
    case = store.case(add_case(store, anna))
    assert case.image_path == f"{case.id}/image.nii.gz"
    assert store.file(case.image_path) == tmp_path / case.id / "image.nii.gz"
    with pytest.raises(InputError, match="no such case"):
        store.case(new_id())
