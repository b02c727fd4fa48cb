"""``queen-rbee``: the orchestrator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cyclopts

from rbee import __version__
from rbee.model import QUEEN_PORT
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
    hive_port: int | None = None,
    home: Path | None = None,
    lease: float = 10.0,
    token_file: Path | None = None,
    allow_origin: Annotated[tuple[str, ...], cyclopts.Parameter(negative=())] = (),
    slots: int | None = None,
    max_waiting: int = 1024,
    max_waiting_per_model: int = 256,
    max_waiting_size: str = "256M",
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
        First port tried for hives of its own; default: the port of [hive] in config.toml.
    home:
        Directory for the configuration, logs and the token.
    lease:
        Seconds that its hives wait for a beat before they end.
    token_file:
        File with the token that callers must send; default: the token of the home.
    allow_origin:
        Web page that may call, with the token: https://chat.example; repeatable.
    slots:
        Requests that one worker gets at once; default: as many as its engine works on. The others
        wait. A model's alias may say another number.
    max_waiting:
        Requests that may wait, of all models; the next one is refused with 429.
    max_waiting_per_model:
        Requests that may wait for one model.
    max_waiting_size:
        What the bodies of those that wait may take in all, such as 256M; those that are being
        read may take as much again, and 32M in any case.
    owned:
        End with the owner, whose lifeline is stdin.
    """
    from rbee.lean import skip_httpx_command

    skip_httpx_command()
    from rbee import daemon
    from rbee.config import load_config
    from rbee.garbage import collect_rarely
    from rbee.home import choose_token, open_home, short_name
    from rbee.model import new_id
    from rbee.queen.daemon import run
    from rbee.queen.limits import Limits
    from rbee.queen.machine import QueenSetup
    from rbee.units import size
    from rbee.web.door import checked_origin

    limits = Limits(
        slots, max_waiting, max_waiting_per_model,
        size(max_waiting_size, hint="queen-rbee daemon --max-waiting-size 256M"),
    )  # fmt: skip

    async def main(root: daemon.Root) -> None:
        collect_rarely()
        origins = tuple(map(checked_origin, allow_origin))
        place = open_home(home)
        queen_id = new_id("queen")
        start = root.start
        place_of_token, token = (None, start.token) if start else choose_token(place, token_file)
        setup = QueenSetup(
            id=queen_id,
            home=place,
            run_dir=Path(start.run_dir) if start else place.run / short_name(queen_id),
            token=token,
            token_file=place_of_token,
            nonce=daemon.ensure_nonce(),
            owner=start.owner if start else "operator",
            host=host,
            port=port,
            exact_port=not owned,
            hive_port=load_config(place.config_file).hive.port if hive_port is None else hive_port,
            lease=start.lease if start else lease,
            limits=limits,
        )
        await run(setup, root, allowed_origins=origins)

    return daemon.run_daemon("queen-rbee", main, owned=owned)


def main() -> None:
    from rbee.daemon import run_cli

    run_cli(app)


if __name__ == "__main__":
    main()
