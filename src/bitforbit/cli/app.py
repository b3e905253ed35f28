"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from bitforbit import __version__
from bitforbit.cli import bench, chat, compress, decompress, demo, info, inspect, io, plan, run, serve, verify

app = typer.Typer(
    name="bitforbit",
    help="Lossless compression of model weights: a third smaller, bit for bit exact, fast.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.command)
app.command("decompress")(decompress.command)
app.command("verify")(verify.command)
app.command("inspect")(inspect.command)
app.command("run")(run.command)
app.command("chat")(chat.command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.command)
app.command("bench")(bench.command)
app.command("info")(info.command)
app.command("io")(io.command)
app.command("plan")(plan.command)
app.command("demo")(demo.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bitforbit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
