"""Stores on both engines, each test with a database of its own."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from benchmarks.postgres_server import postgres_server, programs
from medseg.review.store.models import User, new_id
from medseg.review.store.postgres import postgres_engine
from medseg.review.store.repo import NewMask, Store

_MAIN = sys.modules["__main__"]  # of the tests: a fixture of a whole module may run the page before a test does


@pytest.fixture(autouse=True)
def main_module() -> Iterator[None]:
    """Streamlit makes the page's script the module __main__, which processes that are spawned later would run again."""
    yield
    sys.modules["__main__"] = _MAIN


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of this run, which listens to nothing but a socket in its own folder."""
    if given := os.environ.get("MEDSEG_TEST_PG"):
        yield given
        return
    binaries = programs()
    if binaries is None:
        pytest.skip("no PostgreSQL server here (initdb not found; Debian package postgresql), nor MEDSEG_TEST_PG")
    with postgres_server(binaries, fsync=False) as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'review.sqlite'}"
        return
    server = request.getfixturevalue("postgres")
    name = f"t{uuid.uuid4().hex}"
    _administer(server, f"CREATE DATABASE {name}")
    yield server.replace("/postgres?", f"/{name}?")
    _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


def _administer(server: str, statement: str) -> None:
    """Run a statement that no transaction may hold."""
    engine = postgres_engine(make_url(server))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    found = Store(url, tmp_path)
    yield found
    found.close()


def add_case(store: Store, by: User, name: str = "case one") -> str:
    """A case without files."""
    case_id = new_id()
    folder = store.folder / case_id
    store.add_case(
        case_id,
        name=name,
        image=folder / "image.nii.gz",
        image_sha256="a" * 64,
        sources=[folder / "image.nii.gz"],
        grid=folder / "grid.nii.gz",
        shape=(4, 5, 6),
        spacing=(1.0, 1.0, 2.0),
        modality="CT",
        by=by,
    )
    return case_id


def new_mask(store: Store, case_id: str) -> NewMask:
    """A mask's file that is only a name."""
    mask_id = new_id()
    return NewMask(mask_id, store.folder / case_id / f"{mask_id}.nii.gz", mask_id.replace("-", "") * 2, 7)
