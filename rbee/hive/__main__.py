"""``rbee-hive``: the pool manager of one node."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts

from rbee import __version__
from rbee.model import HIVE_PORT, WORKER_PORT
from rbee.sources import Environment, Table

if TYPE_CHECKING:
    from rbee.hive.zygotes import Child
    from rbee.wire.messages import DaemonStart

app = cyclopts.App(
    config=[Environment(), Table("hive")],
    name="rbee-hive",
    version=__version__,
    help="The pool manager: workers and models of one node.",
)


@app.command(name="daemon")
def run_daemon(
    *,
    host: str = "127.0.0.1",
    port: int = HIVE_PORT,
    worker_port: int = WORKER_PORT,
    node: str = "localhost",
    memory: str | None = None,
    home: Path | None = None,
    token_file: Path | None = None,
    owned: Annotated[bool, cyclopts.Parameter(negative="")] = False,
) -> int:
    """Run a hive until it is told to stop.

    Parameters
    ----------
    host:
        Address to listen on.
    port:
        Port to listen on; 0 takes any free one. An operator's hive fails if it is taken.
    worker_port:
        First port tried for workers.
    node:
        Name of this node.
    memory:
        What its workers on the CPU may take in all, such as 8G; default: what is free.
    home:
        Directory for models, logs and the token.
    token_file:
        File with the token that callers must send; default: the token of the home.
    owned:
        End with the owner, whose lifeline is stdin.
    """
    from rbee.lean import no_collecting, skip_httpx_command

    skip_httpx_command()
    with no_collecting():
        from rbee import daemon
        from rbee.home import choose_token, open_home, short_name
        from rbee.model import new_id
        from rbee.units import size

    budget = None if memory is None else size(memory, hint="rbee-hive daemon --memory 8G")
    zygotes: dict[str, Child] = {}

    @no_collecting()
    def prepare(start: DaemonStart | None) -> None:
        if start is not None and start.engine:
            from rbee.hive.ahead import fork_ahead

            zygotes.update(
                fork_ahead(start.engine, open_home(home).log_file(f"zygote-{start.engine}"))
            )
        import rbee.hive.daemon  # noqa: F401 - beside what the zygote imports

    async def main(root: daemon.Root) -> None:
        from rbee.hive.daemon import run
        from rbee.hive.workers import HiveSetup

        place = open_home(home)
        hive_id = new_id("hive")
        start = root.start
        place_of_token, token = (None, start.token) if start else choose_token(place, token_file)
        setup = HiveSetup(
            id=hive_id,
            home=place,
            run_dir=Path(start.run_dir) if start else place.run / short_name(hive_id),
            token=token,
            token_file=place_of_token,
            owner=start.owner if start else "operator",
            node=node,
            host=(start.host if start else "") or host,
            port=port,
            exact_port=not owned,
            worker_port=worker_port,
            queen_url=start.queen_url if start else "",
            memory=budget,
        )
        await run(setup, root, zygotes)

    return daemon.run_daemon("rbee-hive", main, owned=owned, prepare=prepare)


@app.command
def detect(*, home: Path | None = None) -> None:
    """Print what this machine has: devices, memory, disk, engines, and what the guarantee needs."""
    from rbee.hive.detect import detect as look
    from rbee.home import find_home

    sys.stdout.write(json.dumps(look(find_home(home).root), indent=2) + "\n")


@app.command(name="import", show=False)
def import_engine(engine: str, /) -> None:
    """Import an engine as its workers do: what is installed may still be broken."""
    from rbee.hive.detect import import_engine as try_import

    try_import(engine)


def main() -> None:
    from rbee.daemon import run_cli

    run_cli(app)


if __name__ == "__main__":
    main()
