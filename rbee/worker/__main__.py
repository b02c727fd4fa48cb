"""``llm-worker-rbee``: serve one model from this process."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from rbee import __version__, guard
from rbee.daemon import ensure_nonce, print_error
from rbee.errors import RbeeError, UsageError
from rbee.home import check_token, choose_token, open_home
from rbee.model import WORKER_PORT, WorkerConfig, WorkerId, WorkerSpec, new_id
from rbee.sources import Environment, Table, unless_owned
from rbee.wire import codec

START_LIMIT = 30.0

app = App(
    config=[unless_owned(Environment()), unless_owned(Table("worker"))],
    name="llm-worker-rbee",
    help="Serve one model over HTTP until stopped. A hive starts workers itself; by hand this is "
    "for trying one out.",
    version=__version__,
)


@app.default
def worker(
    *,
    model: str = "",
    engine: str = "vllm",
    backend: str = "cpu",
    device: str = "0",
    host: str = "127.0.0.1",
    port: int = WORKER_PORT,
    served_name: tuple[str, ...] = (),
    task: str = "generate",
    max_model_len: int | None = None,
    dtype: str | None = None,
    kv_cache_bytes: int | None = None,
    max_num_seqs: int | None = None,
    engine_arg: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    token_file: Path | None = None,
    hive_url: str = "",
    id: str = "",
    run_dir: Path | None = None,
    owned: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Serve one model.

    Parameters
    ----------
    model
        Directory with config.json and safetensors (any name for the echo engine).
    engine
        vllm, echo, or another installed engine.
    backend
        cpu or cuda; never another one than asked for.
    device
        Device indices; several mean tensor parallel.
    port
        The next free one if it is taken; 0 for any.
    served_name
        Further names of the model, repeatable.
    task
        generate or embed.
    max_model_len
        Tokens that prompt and answer may have together.
    kv_cache_bytes
        Size of the KV cache in bytes.
    max_num_seqs
        How many requests run at once.
    engine_arg
        KEY=VALUE for the engine itself, repeatable.
    token_file
        File with the token callers must send; default: the token of $RBEE_HOME.
    hive_url
        Where the ready callback goes.
    owned
        Standard input is the lifeline: its end stops the worker. Without --model its first line
        is `start {json}` with the whole configuration.
    """
    if owned and not model:
        return _run_started()
    if not model:
        raise UsageError("--model is needed", hint="llm-worker-rbee --model DIRECTORY")
    spec = WorkerSpec(
        id=WorkerId(id or new_id("worker")),
        model=model,
        model_dir=str(Path(model).resolve()) if Path(model).is_dir() else "",
        served_names=served_name,
        engine=engine,
        backend=backend,
        device=device,
        task=task,
        max_model_len=max_model_len,
        dtype=dtype,
        kv_cache_bytes=kv_cache_bytes,
        max_num_seqs=max_num_seqs,
        engine_args=dict(map(_key_value, engine_arg)),
    )
    ensure_nonce()
    _, token = choose_token(open_home(), token_file)
    with tempfile.TemporaryDirectory(prefix="rbee-worker-", dir=run_dir) as private:
        config = WorkerConfig(spec, private, token, host, port, hive_url)
        return _run(config, owned)


def _run_started() -> int:
    try:
        given, _ = guard.read_start(0, START_LIMIT)
    except (ValueError, TimeoutError) as exc:
        raise UsageError(f"--owned without --model needs a start line on stdin: {exc}") from exc
    guard.set_oom_score(500)  # the OOM killer spares queen, hive, guards and sshd
    config = codec.structure(given, WorkerConfig)
    check_token(config.token, "the owner's start line", hint="rbee-keeper worker start")
    return _run(config, True)


def _run(config: WorkerConfig, owned: bool) -> int:
    from rbee.worker.daemon import run_worker

    return run_worker(config, lifeline=0 if owned else None)


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"--engine-arg takes KEY=VALUE, got {text!r}")
    return key, value


def main() -> None:
    try:
        code = app(result_action="return_value")
    except RbeeError as error:
        print_error(error)
        code = error.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)  # torch's teardown takes seconds, and an engine thread may be stuck


if __name__ == "__main__":
    main()
