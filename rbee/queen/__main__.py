"""``queen-rbee``: the orchestrator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from rbee import __version__
from rbee.model import HIVE_PORT, QUEEN_PORT
from rbee.sources import Environment, Table

app = cyclopts.App(
    config=[Environment(), Table("queen")],
    name="queen-rbee",
    version=__version__,
    help="The orchestrator of one inference cluster.",
)


@app.command(name="daemon")
def run_daemon(
    *,
    host: str = "127.0.0.1",
    port: int = QUEEN_PORT,
    hive_port: int = HIVE_PORT,
    home: Path | None = None,
    lease: float = 10.0,
    owned: Annotated[bool, cyclopts.Parameter(negative="")] = False,
) -> int:
    """Run a queen until it is told to stop.

    Parameters
    ----------
    host:
        Address to listen on.
    port:
        Port to listen on; 0 takes any free one. An operator's queen fails if it is taken.
    hive_port:
        First port tried for hives of its own.
    home:
        Directory for the configuration, logs and the token.
    lease:
        Seconds that its hives wait for a beat before they end.
    owned:
        End with the owner, whose lifeline is stdin.
    """
    from rbee import daemon
    from rbee.home import open_home, read_token, short_name
    from rbee.model import new_id
    from rbee.queen.daemon import run
    from rbee.queen.hives import QueenSetup

    async def main(root: daemon.Root) -> None:
        place = open_home(home)
        queen_id = new_id("queen")
        start = root.start
        setup = QueenSetup(
            id=queen_id,
            home=place,
            run_dir=Path(start.run_dir) if start else place.run / short_name(queen_id),
            token=start.token if start else read_token(place),
            nonce=daemon.ensure_nonce(),
            owner=start.owner if start else "operator",
            host=host,
            port=port,
            exact_port=not owned,
            hive_port=hive_port,
            lease=start.lease if start else lease,
        )
        await run(setup, root)

    return daemon.run_daemon("queen-rbee", main, owned=owned)


def main() -> None:
    from rbee.daemon import run_cli

    run_cli(app)


if __name__ == "__main__":
    main()
