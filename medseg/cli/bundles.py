"""``medseg bundles``: list, show, verify and pack."""

from __future__ import annotations

import typer

app = typer.Typer(help="Shipped and own bundles: list, show, verify, pack.", no_args_is_help=True)

@app.command("list")
def list_() -> None:
    """List."""
