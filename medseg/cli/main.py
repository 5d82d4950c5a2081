"""``medseg``: the commands, and the one place where a failure becomes a line and an exit code."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

import medseg
from medseg.cli.batch import batch
from medseg.cli.benchmark import app as benchmark_app
from medseg.cli.bundles import app as bundles_app
from medseg.cli.data import app as data_app
from medseg.cli.evaluate import evaluate
from medseg.cli.infer import infer
from medseg.cli.inspect import inspect
from medseg.cli.label import app as label_app
from medseg.cli.networks import app as networks_app
from medseg.cli.phantom import app as phantom_app
from medseg.cli.review import review
from medseg.cli.train import train
from medseg.cli.weights import app as weights_app
from medseg.errors import Interrupted, MedsegError

log = logging.getLogger(__name__)

app = typer.Typer(
    name="medseg",
    help="Segment medical volumes with published networks.\n\nResearch use only; not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(infer)
app.command()(batch)
app.command()(inspect)
app.command()(evaluate)
app.command()(train)
app.command()(review)
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(bundles_app, name="bundles")
app.add_typer(data_app, name="data")
app.add_typer(label_app, name="label")
app.add_typer(networks_app, name="networks")
app.add_typer(phantom_app, name="phantom")
app.add_typer(weights_app, name="weights")


def _print_version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        print(f"medseg {medseg.__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[  # noqa: ARG001 - handled by its callback
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show log lines, and the traceback of a failure.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.ERROR,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    logging.getLogger("medseg").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.captureWarnings(capture=True)  # a library's warning goes to the log, not between medseg's lines


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


def main() -> None:
    """Run the command line; a known failure is one line on stderr and its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except MedsegError as error:
        log.debug("failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except Interrupted as stop:
        print(f"error: stopped by {signal.Signals(stop.number).name}; nothing is half written", file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except MemoryError:
        print("error: out of memory; use a smaller scan, or a machine with more memory", file=sys.stderr)
        raise SystemExit(5) from None
    except Exception as error:
        raise SystemExit(_internal(error)) from None


def _internal(error: Exception) -> int:
    """One line for a failure nobody foresaw; the traceback goes to a log file that only its owner can read."""
    import os
    import tempfile
    import traceback

    log.debug("failed")
    handle, path = tempfile.mkstemp(prefix="medseg-", suffix=".log")  # 0600
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        traceback.print_exception(error, file=stream)
    print(f"error: internal error ({type(error).__name__}); please report it with {path}", file=sys.stderr)
    return 1
