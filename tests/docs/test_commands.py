"""Every command line on the pages and in the commands' own help is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from medseg.cli.main import app
from tests.docs.test_pages import PAGES, ROOT

COMMAND: Any = typer.main.get_command(app)
SHELL = re.compile(r"\s+(?:#|\||&&|>|->|;)(?:\s.*|$)")  # a comment, or what the shell does next


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and the words after them."""
    command = COMMAND
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def all_commands(group: Any = COMMAND) -> Iterator[Any]:
    for command in getattr(group, "commands", {}).values():
        yield command
        yield from all_commands(command)


def lines_to_copy(page: str) -> list[str]:
    """What stands in a page's blocks of code after ``medseg``, continued lines joined."""
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    text = "\n".join((fenced, *re.findall(r"^ {4}.*", page, re.MULTILINE))).replace("\\\n", " ")
    found = re.findall(r"(?:^\s*|&& )(?:\.venv/bin/)?medseg +(.+)$", text, re.MULTILINE)
    return [SHELL.sub("", line) for line in found]


def refusal(line: str) -> str | None:
    """What the command line says against a line; None where it takes it. Nothing is run."""
    command, words = command_of([word for word in shlex.split(line) if word != "..."])
    try:
        command.make_context("medseg", words)
    except Exception as error:  # typer's own classes differ between its versions
        return f"medseg {line}: {error!r}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_can_be_typed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [said for line in lines_to_copy(text) if (said := refusal(line))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    for mention in re.findall(r"`medseg\s+([^`]+)`", page.read_text(encoding="utf-8")):
        command, words = command_of(mention.split())
        assert command is not COMMAND or not words or words[0].startswith("-") or words[0].isupper(), mention
        known = {"-h", "--help", *(name for one in command.params for name in (*one.opts, *one.secondary_opts))}
        assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= known, mention


def test_the_pages_have_the_commands_that_they_are_about() -> None:
    lines = [line for page in PAGES for line in lines_to_copy(page.read_text(encoding="utf-8"))]
    assert len(lines) > 100
    used = {command_of(shlex.split(line))[0].name for line in lines}
    assert used >= {command.name for command in all_commands() if not hasattr(command, "commands")}


def test_examples_in_the_help_can_be_typed() -> None:
    examples = [
        line
        for command in all_commands()
        for line in re.findall(r"^\s*(?:- |Example: )medseg (.+)$", command.help or "", re.MULTILINE)
    ]
    assert len(examples) > 25
    assert [said for line in examples if (said := refusal(line))] == []


def test_every_command_s_help_lists_its_exit_codes() -> None:
    silent = [
        command.name
        for command in all_commands()
        if not hasattr(command, "commands") and "Exit codes: 0" not in command.help
    ]
    assert not silent
