"""`medseg networks list | show`: facts that are measured again, read without loading torch."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

from medseg.cli.networks import app
from medseg.errors import UsageError
from medseg.networks import names
from medseg.networks.cost import measure_cost
from medseg.networks.facts import read_facts

RUN = CliRunner()


@pytest.mark.parametrize("name", names())
def test_the_stated_facts_are_those_of_the_network(name: str) -> None:
    facts = read_facts(name)
    assert facts == import_module(f"medseg.networks.{name}").FACTS
    cost = measure_cost(name, facts.default, facts.default_input)
    assert cost.parameters == facts.parameters
    assert cost.gmacs == pytest.approx(facts.gmacs, abs=0.06)
    assert "arXiv" in facts.paper
    assert facts.code.startswith("github.com/") or facts.code == "none published"


def test_the_list_names_every_architecture_and_loads_no_torch() -> None:
    script = (
        "import sys; from medseg.cli.networks import list_; list_(json_=True); "
        "print([m for m in ('torch', 'monai', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == names()
    assert {row["code_license"] for row in rows} >= {"Apache-2.0", "none"}


def test_a_table_holds_size_cost_and_licence() -> None:
    text = RUN.invoke(app, ["list"], env={"COLUMNS": "80"}).output
    row = next(line for line in text.splitlines() if line.startswith("transunet"))
    for word in ("2D", "105.3 M", "29.2", "1x224x224", "2102.04306", "Apache-2.0"):
        assert word in row


def test_show_says_what_a_user_asks_before_choosing() -> None:
    text = " ".join(RUN.invoke(app, ["show", "swin_unetr"], env={"COLUMNS": "200"}).output.split())
    for word in ("multiple of 32", "62,187,296", "81.86 %", "MONAI-extra-test-data", "Apache-2.0", "not counted"):
        assert word in text
    shown = json.loads(RUN.invoke(app, ["show", "swin_unetr", "--json"]).output)
    assert shown["default_input"] == [1, 1, 96, 96, 96]
    wrong = RUN.invoke(app, ["show", "unet"])
    assert isinstance(wrong.exception, UsageError)
    assert "known: dformer" in str(wrong.exception)
