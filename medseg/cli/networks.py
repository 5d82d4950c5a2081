"""``medseg networks``: the architectures, and what is known about each."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from typing import Annotated, Any

import typer

from medseg.errors import UsageError
from medseg.networks.facts import COUNTED, Facts, read_facts
from medseg.networks.registry import names

app = typer.Typer(help="Networks: the architectures that bundles and training use. List, show.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


@app.command("list")
def list_(*, json_: AsJson = False) -> None:
    """List the architectures: size and cost of the published configuration, paper, licence of the public code.

    The size is C x (D x) H x W. A licence "none" means that the public code carries none; medseg's own is Apache-2.0.

    Exit codes: 0 listed.
    """
    rows = [(name, read_facts(name)) for name in names()]
    if json_:
        print(json.dumps([_as_json(name, facts) for name, facts in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "dims"):
        table.add_column(column, no_wrap=True)
    for column in ("params", "GMACs", "at input"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("arXiv", "licence"):  # of the public code
        table.add_column(column, no_wrap=True)
    for name, facts in rows:
        cells = (
            name,
            _dims(facts),
            f"{facts.parameters / 1e6:.1f} M",
            f"{facts.gmacs:.1f}",
            _size(facts),
            _arxiv(facts.paper),
            facts.code_license,
        )
        table.add_row(*(Text(cell) for cell in cells))
    Console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name of medseg networks list.")], *, json_: AsJson = False
) -> None:
    """Show one architecture: input rule, size, paper, public code, published weights and results.

    Example: medseg networks show swin_unetr

    Exit codes: 0 shown, 2 no such network.
    """
    try:
        facts = read_facts(name)
    except ValueError as err:
        raise UsageError("NAME", str(err), "see medseg networks list") from err
    if json_:
        print(json.dumps(_as_json(name, facts), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in (
        ("name", f"{name} ({facts.title})"),
        ("paper", facts.paper),
        ("code", f"{facts.code}, licence: {facts.code_license}"),
        ("weights", facts.weights),
        ("dimensions", _dims(facts)),
        ("input", facts.input_rule),
        ("default", f"{json.dumps(dict(facts.default))} at {_size(facts)}"),
        ("parameters", f"{facts.parameters:,}"),
        ("GMACs", f"{facts.gmacs:.1f} ({COUNTED})"),
        *((f"reported: {data}", figures) for data, figures in facts.results),
    ):
        table.add_row(Text(key), Text(value))
    if not facts.results:
        table.add_row("reported", "not recorded here; see the paper")
    Console().print(table)


def _as_json(name: str, facts: Facts) -> dict[str, Any]:
    results = [{"data": data, "figures": figures} for data, figures in facts.results]
    return {"name": name, **asdict(facts), "results": results, "counted": COUNTED}


def _dims(facts: Facts) -> str:
    return ", ".join(f"{dims}D" for dims in facts.spatial_dims)


def _size(facts: Facts) -> str:
    return "x".join(str(size) for size in facts.default_input[1:])


def _arxiv(paper: str) -> str:
    found = re.search(r"arXiv (\d{4}\.\d{5})", paper)
    return found[1] if found else ""
