"""Models sent to a node's catalog; the node is this machine, through a real sshd."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from rbee.aio import Aio
from rbee.errors import BadInputError, ConflictError, InsufficientError, RbeeError
from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.models.catalog import Catalog, File, list_models
from rbee.models.inspect import inspect_model
from rbee.models.parcel import Parcel, find_parcel, seal
from rbee.models.provision import LocalModel, _entry, provision
from rbee.models.staging import lock_now
from rbee.nodes.delivery import Delivered, deliver
from rbee.nodes.node import Node
from rbee.nodes.store import NodeStore
from rbee.ssh import (
    ConnectionLostError,
    RemoteMachineError,
    TransferError,
    connection,
    open_connection,
)
from rbee.testing.tiny_model import write_tiny_model
from tests.models.conftest import Narration, used
from tests.ssh.sshd import Sshd

pytestmark = pytest.mark.slow

HERE = "hf:org/tiny"


@pytest.fixture(scope="module")
def tiny_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny(tiny_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_once, tmp_path / "mine/tiny"))


@pytest.fixture
def far(tmp_path: Path) -> Home:
    """The node's home; not made yet."""
    return Home(tmp_path / "far home", tmp_path / "run")


@pytest.fixture
def narrate() -> Narration:
    return Narration()


Send = Callable[..., Any]


@pytest.fixture
def send(sshd: Sshd, aio: Aio, far: Home, narrate: Narration) -> Send:
    async def send(parcel: Parcel, told: Any = narrate, *, sealed: bool = False) -> Delivered:
        with trio.fail_after(30):
            whole = parcel if sealed else await seal(parcel, narrate)
            async with open_connection(sshd.target(), aio) as opened:
                return await deliver(whole, opened, told, home=str(far.root))

    return send


def put(home: Home, tiny: Path) -> Parcel:
    """Have the tiny model in the catalog, and find it there."""
    name = "hf--org-tiny--0123"
    found = inspect_model(Path(shutil.copytree(tiny, home.models / name)))
    Catalog(home.models).save(name, _entry(HERE, found, version="c0ffee"))
    return find_parcel(home, HERE, aliases={})


async def use(far: Home, name: str) -> LocalModel:
    """Find a model on the node; nothing may be fetched."""
    missing: Any = None
    return await provision(name, far, dtype="float32", run=missing, narrate=Narration())


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def leftovers(far: Home) -> list[Path]:
    areas = (".partial", ".staging", ".locks", ".in-use")
    return [path for area in areas for path in far.models.glob(f"{area}/*")]


async def test_a_model_of_the_catalog_is_one_of_the_nodes_catalog(
    send: Send, home: Home, far: Home, tiny: Path, narrate: Narration
) -> None:
    parcel = put(home, tiny)
    delivered = await send(parcel)
    assert delivered == Delivered(str(far.models / parcel.name), parcel.entry.size)
    assert contents(Path(delivered.directory)) == contents(tiny)
    (item,) = list_models(far)
    assert item.damage == ""
    assert item.entry is not None
    assert (item.entry.reference, item.entry.version) == (HERE, "c0ffee")
    assert all(file.sha256 for file in item.entry.files)
    assert (await use(far, HERE)).directory == Path(delivered.directory)
    assert leftovers(far) == []
    assert narrate.shares[-1] == 1.0
    with used(far, parcel.name):
        assert await send(parcel) == Delivered(delivered.directory, 0)
    assert narrate.lines[-1] == ("skip", f"{HERE}: node mac has it already")


async def test_a_directory_is_found_on_the_node_by_the_path_it_has_here(
    send: Send, home: Home, far: Home, tiny: Path
) -> None:
    for name in ("run.py", "pytorch_model.bin", "notes.txt"):
        (tiny / name).write_text("not of the model")
    (tiny / "1_Pooling").mkdir()
    (tiny / "1_Pooling/config.json").write_text("{}")
    delivered = await send(find_parcel(home, str(tiny), aliases={}))
    there = Path(delivered.directory)
    assert (there / "1_Pooling/config.json").read_text() == "{}"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*os.listdir(there)}
    assert not {"run.py", "pytorch_model.bin"} & {*os.listdir(there)}
    changed = tiny / "generation_config.json"
    changed.write_text("{}")
    parcel = find_parcel(home, str(tiny), aliases={})
    with used(far, there.name), pytest.raises(ConflictError, match="another version") as caught:
        await send(parcel)
    assert caught.value.code == "model_in_use"
    assert (there / changed.name).read_text() != "{}"
    assert (await send(parcel)).directory == str(there)
    assert (there / changed.name).read_text() == "{}"
    assert find_parcel(home, "mini", aliases={"mini": str(tiny)}).name == parcel.name
    shutil.rmtree(tiny)
    model = await use(far, tiny.as_uri())
    assert (model.directory, model.reference) == (there, tiny.as_uri())
    assert leftovers(far) == []


async def test_a_copy_that_was_cut_goes_on_where_it_was(
    send: Send, sshd: Sshd, home: Home, far: Home, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = connection._write

    async def cut(there: Any, data: bytes, offset: int) -> None:
        if offset > 0:
            sshd.kill_sessions()  # after the first piece, before the second
        await write(there, data, offset)

    weights = tiny / "model.safetensors"
    lengthen(weights, 3 * connection.CHUNK)
    parcel = await seal(find_parcel(home, str(tiny), aliases={}), Narration())
    monkeypatch.setattr(connection, "_write", cut)
    with pytest.raises(ConnectionLostError):
        await send(parcel, sealed=True)
    monkeypatch.setattr(connection, "_write", write)
    (item,) = list_models(far)
    assert item.damage.endswith("tiny --node NODE --copy goes on with it")
    came = sum(path.stat().st_size for path in (far.models / ".partial" / parcel.name).iterdir())
    assert connection.CHUNK <= came < parcel.entry.size
    delivered = await send(parcel, sealed=True)
    assert delivered.sent == parcel.entry.size - came
    assert (Path(delivered.directory) / weights.name).read_bytes() == weights.read_bytes()
    assert [item.damage for item in list_models(far)] == [""]
    assert leftovers(far) == []


def lengthen(weights: Path, size: int) -> None:
    """Add a tensor of ``size`` bytes."""
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["padding"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
    head = json.dumps(header).encode()
    weights.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    os.truncate(weights, 8 + len(head) + end + size)


async def test_what_comes_wrong_is_sent_again_and_never_a_model(
    send: Send, home: Home, far: Home, tiny: Path
) -> None:
    parcel = await seal(find_parcel(home, str(tiny), aliases={}), Narration())
    (tiny / "config.json").write_bytes((tiny / "config.json").read_bytes().swapcase())
    narrate = Narration()
    with pytest.raises(TransferError, match="did not come to node mac as it was sent"):
        await send(parcel, narrate, sealed=True)
    assert narrate.actions.count("retry") == 2
    (item,) = list_models(far)
    assert "not finished" in item.damage
    shutil.rmtree(tiny)  # or it would be found where it came from
    with pytest.raises(RbeeError, match="no model at"):
        await use(far, tiny.as_uri())


async def test_a_node_that_cannot_take_it_says_why(
    send: Send, home: Home, far: Home, tiny: Path, tmp_path: Path
) -> None:
    parcel = await seal(find_parcel(home, str(tiny), aliases={}), Narration())
    huge = attrs.evolve(parcel.entry, files=(File("model.safetensors", 1 << 60, "0" * 64),))
    with pytest.raises(
        InsufficientError, match=r"on node mac: needed 1048576\.0 TiB, free"
    ) as full:
        await send(attrs.evolve(parcel, entry=huge), sealed=True)
    assert full.value.code == "insufficient_disk"
    assert list_models(far) == []
    with lock_now(far.models, parcel.name), pytest.raises(ConflictError) as busy:
        await send(parcel, sealed=True)
    assert busy.value.code == "model_busy"
    shutil.rmtree(far.root)
    far.root.write_text("in the way")
    with pytest.raises(RemoteMachineError, match="far home"):
        await send(parcel, sealed=True)


async def test_what_has_changed_on_the_disk_here_is_not_sent(home: Home, tiny: Path) -> None:
    parcel = await seal(put(home, tiny), Narration())
    (parcel.directory / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"tokenizer\.json is not what was fetched"):
        await seal(parcel, Narration())


# the command ------------------------------------------------------------------------------------
@pytest.fixture
def mac(sshd: Sshd, home: Home, far: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the sshd as a node."""
    (tmp_path / "user/.ssh").mkdir(parents=True)
    shutil.copy(sshd.known_hosts, tmp_path / "user/.ssh/known_hosts")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    target = sshd.target()
    node = Node(
        "mac", host=target.host, port=target.port, user=target.user, key=str(sshd.key),
        environment={"RBEE_HOME": str(far.root)},
    )  # fmt: skip
    NodeStore.of(home)._insert(node)


def test_the_command_needs_no_queen(
    mac: None, far: Home, tiny: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tiny.parent)
    line = ["model", "pull", "./tiny", "--node", "mac", "--copy"]
    assert run_line(line) == 0
    out, err = capfd.readouterr()
    (item,) = list_models(far)
    assert out == f"{item.directory}\n"
    assert "keeper: connect to mac" in err
    assert f"keeper: fetched {tiny.as_uri()} on mac, " in err
    assert run_line([*line, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"model": tiny.as_uri(), "directory": str(item.directory)}
    assert "mac has it already" in err


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["tinyllama"], 2, "it needs --node NAME"),
        (["tinyllama", "--node", "mac", "--dtype", "banana"], 1, "'banana' is not a dtype"),
        (["x", "--node", "mac", "--queen-url", "http://192.0.2.1:1"], 2, "registry"),
        (["tinyllama", "--node", "localhost"], 2, "it needs --node NAME"),
        (["tinyllama", "--node", "pc"], 1, "no node 'pc'; known: localhost, mac"),
        (["tinyllama", "--node", "mac"], 1, "tinyllama is not on this machine"),
        (["./nowhere", "--node", "mac"], 1, "no such file or directory"),
    ],
)
def test_a_copy_that_cannot_be_is_one_error(
    mac: None, far: Home, capfd: pytest.CaptureFixture[str], line: list[str], code: int, says: str
) -> None:
    assert run_line(["model", "pull", *line, "--copy"]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert says in err
    assert "hint: " in err
    assert not far.root.exists()
