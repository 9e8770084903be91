"""The commands that come before any work: doctor, init."""

from pathlib import Path
from typing import Annotated

import typer

from rabbet.cli import options


def doctor(as_json: options.Json = False) -> None:
    """Say what is installed, which integer kernels this processor has, and what is missing."""
    from rabbet.cli import machine, tables

    if as_json:
        tables.print_json(machine.facts())
    else:
        tables.show(machine.parts())


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"The network: {options.NETWORK}.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The file to write.")] = Path("nets.py"),
) -> None:
    """Look at a network, and write a commented nets.py in which only the data are missing."""
    from rabbet.cli.networks import open_network
    from rabbet.cli.stored import writable
    from rabbet.cli.template import program_for
    from rabbet.errors import FileError
    from rabbet.files import write_whole

    if out.exists():
        raise FileError(f"{out} is there already; name another file with --out")
    if out.suffix != ".py":
        raise typer.BadParameter(f"{out} must end in .py", param_hint="--out")
    writable(out)
    write_whole(out, [program_for(model, open_network(model), str(out)).encode()])
    print(f"{out}: fill in what stands in capitals, then run")
    print(f"    rabbet survey {out}:network --data {out}:batches")
