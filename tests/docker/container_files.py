"""Reads the container files, for the tests of what they say and of what they build."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: keyword and the rest, lines that go on joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage to its instructions, FROM first; a stage on another one has those of that one before its own."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = [*found.get(base, []), (word, base)]
        elif name:
            found[name].append((word, rest))
    return found


def last(stage: str, keyword: str) -> str:
    return [rest for word, rest in stages()[stage] if word == keyword][-1]


def arguments() -> dict[str, str]:
    """Build arguments with their defaults."""
    return dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)


def locked(name: str) -> dict[str, str]:
    lines = [line for line in (DOCKER / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.+-]*", line) for line in lines)
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines}
