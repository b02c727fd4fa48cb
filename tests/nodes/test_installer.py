"""What runs on a node, piece by piece on this machine; `test_install` sends it through SSH."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from rbee.hints import TORCH_CPU_INDEX
from rbee.nodes import install, installer
from rbee.nodes.install import Wanted, failure
from rbee.nodes.installer import MARKER, FailedError, Place
from rbee.nodes.wheel import pack
from rbee.ssh import SshTarget

Captured = pytest.CaptureFixture[str]
MAC = SshTarget("mac", "192.0.2.7")
CPU = f"--extra-index-url {TORCH_CPU_INDEX}"
DETECTS = "#!/bin/sh\necho '{}'\n"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "venv")
    place.venvs.mkdir()
    return place


def plant(place: Place, name: str, **facts: Any) -> Path:
    venv = place.venvs / name
    (venv / "bin").mkdir(parents=True)
    write_program(venv, DETECTS)
    (venv / MARKER).write_text(json.dumps({"link": str(place.link), **facts}))
    (venv / "module.so").write_bytes(b"x" * 4096)
    return venv


def write_program(venv: Path, script: str) -> None:
    (venv / "bin/rbee-hive").write_text(script)
    (venv / "bin/rbee-hive").chmod(0o755)


def order_for(place: Place, **changed: Any) -> dict[str, Any]:
    """Order what `put_in_use` has put there, but for what is ``changed``."""
    order = {"rbee_path": f"{place.link}/bin", "extra": "none", "digest": "old", "version": "1",
             "python": "", "force": False, "wheels": None, "wheel": "/none", "name": "x.whl",
             "torch": None}  # fmt: skip
    return order | changed


def put_in_use(place: Place, name: str) -> Path:
    venv = plant(place, name, ready=True, digest="old", extra="none", python="python")
    installer.point(place.link, venv)
    return venv


def test_only_what_is_ours_and_not_used_is_removed(place: Place) -> None:
    current, half, mapped = (plant(place, name) for name in ("current", "half", "mapped"))
    installer.point(place.link, current)
    other = plant(place, "other", link="/another/link")
    by_hand = place.venvs / "by hand"
    by_hand.mkdir()
    (by_hand / "pyvenv.cfg").touch()
    (place.venvs / "empty").mkdir()
    (place.venvs / f"{installer.GONE}1").mkdir()
    (place.venvs / f"{installer.GONE}1" / "rest").touch()
    with (mapped / "module.so").open("rb") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
            assert installer.clean(place) == [str(mapped)]
        assert set(place.venvs.iterdir()) == {current, mapped, other, by_hand}
    assert installer.clean(place, previous=mapped) == []
    assert mapped.exists()  # a machine that shares this home may run from it
    assert installer.clean(place) == []
    assert not half.exists()
    assert not mapped.exists()


def test_a_new_rbee_that_does_not_run_leaves_the_old_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(venv: Path, *_: object) -> None:
        (venv / "bin").mkdir()
        write_program(venv, "#!/bin/sh\necho 'ImportError: torch' >&2; exit 1\n")

    old = put_in_use(place, "old")
    monkeypatch.setattr(installer, "fill", fill)
    with pytest.raises(FailedError, match="detect ended with code 1") as caught:
        installer.install(order_for(place, digest="new"))
    assert (caught.value.facts["code"], caught.value.facts["log"]) == (
        "broken",
        "ImportError: torch",
    )
    assert place.current == old
    assert {path.name for path in place.venvs.iterdir()} == {".lock", "old"}


def test_an_installation_that_is_killed_leaves_the_old_one_working(place: Place) -> None:
    old = put_in_use(place, "old")
    argv = [sys.executable, installer.__file__, "install", json.dumps(order_for(place, digest="n"))]
    killed = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert killed.stdout is not None
    assert json.loads(killed.stdout.readline())["step"] == "venv"
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert len([path for path in place.venvs.iterdir() if path.is_dir()]) == 2
    assert installer.look(order_for(place))["there"]["venv"] == str(old)
    assert installer.look(order_for(place, digest="n"))["there"] is None
    assert {path.name for path in place.venvs.iterdir()} == {".lock", "old"}


def test_what_is_moved_away_is_never_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    hints = {}
    for path in (".local", ".rbee/venv"):
        (tmp_path / path / "bin").mkdir(parents=True)
        with pytest.raises(FailedError, match="is not of our making") as caught:
            installer.find_place({"rbee_path": f"~/{path}/bin"})
        hints[path] = failure(MAC, Wanted(), **caught.value.facts).hint
    assert hints[".local"] == 'rbee-keeper node update mac --rbee-path ""'
    assert hints[".rbee/venv"].startswith("ssh 192.0.2.7 'mv ")


def test_pip_sees_its_own_wheels_and_nobody_elses_go_while_he_copies_them(place: Place) -> None:
    place.wheelhouse.mkdir()
    for name in ("ours.whl", "others.whl", "stale.whl"):
        (place.wheelhouse / name).touch()
        os.utime(place.wheelhouse / name, (1.0, 1.0))
    for wheels in (["ours.whl"], ["others.whl"]):
        installer.look(order_for(place, digest="new", wheels=wheels))
    installer.remove_old(place.wheelhouse, {"ours.whl"})
    assert {path.name for path in place.wheelhouse.iterdir()} == {"ours.whl", "others.whl"}
    seen = installer.chosen(place, ["ours.whl"], place.link.parent)
    assert [path.name for path in seen.iterdir()] == ["ours.whl"]


def test_the_link_is_replaced_in_one_step(place: Place) -> None:
    one, two = plant(place, "one"), plant(place, "two")
    installer.point(place.link, one)
    place.link.with_name("venv.new").symlink_to("left by somebody who was killed")
    installer.point(place.link, two)
    assert place.link.readlink() == Path("venvs/two")
    assert place.current == two
    assert set(place.link.parent.iterdir()) == {place.link, place.venvs}


def test_a_python_without_pip_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ensurepip", "pip"):
        monkeypatch.setitem(sys.modules, name, None)  # Python's own way to say that there is none
    with pytest.raises(FailedError) as caught:
        installer.make_venv(tmp_path / "venv", [])
    error = failure(MAC, Wanted(), **caught.value.facts)
    assert error.message == f"node mac: {sys.executable} has neither ensurepip nor pip"
    assert error.hint == "ssh -t 192.0.2.7 sudo apt-get install python3-venv"
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_torch_comes_from_its_own_index_where_pips_has_none(
    tmp_path: Path, capfd: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    index = tmp_path.as_uri()
    pip = [sys.executable, "-I", "-m", "pip"]
    with pytest.raises(FailedError) as caught:
        installer.install_torch(pip, [], "no-such-torch==1+cpu", index)
    said = [json.loads(line)["line"] for line in capfd.readouterr().out.splitlines()]
    last = "ERROR: No matching distribution found for no-such-torch==1+cpu"
    assert said.count(last) == 2
    assert f"pip found no no-such-torch==1+cpu, trying {index}" in said
    error = failure(MAC, Wanted(wheelhouse=tmp_path), **caught.value.facts)
    assert error.message == f"node mac: pip finds no package that fits: {last[7:]}"
    assert last in error.details["log"]
    assert error.hint.endswith(f"--dest {tmp_path} {CPU} no-such-torch==1+cpu")


@pytest.mark.slow
def test_a_wheelhouse_of_what_is_installed_serves_pip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    pack(distribution("msgspec"), tmp_path)
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "there"))
    pip = [sys.executable, "-I", "-m", "pip"]
    installer.pip_install(pip, ["--no-index", "--find-links", str(tmp_path)], "msgspec")
    code = "import sys; sys.path[:0] = sys.argv[1:]; import msgspec; print(msgspec._core.__file__)"
    argv = [sys.executable, "-I", "-c", code, str(tmp_path / "there")]
    assert str(tmp_path / "there") in subprocess.check_output(argv, text=True)


@pytest.mark.parametrize(
    ("code", "log", "said", "hint"),
    [
        (
            "pip",
            "Max retries\nERROR: no",
            "index does not answer: no",
            "&& rbee-keeper node install mac --wheel",
        ),
        ("pip", "", "pip failed: ended with 1", "pip config list"),
        ("broken", "ImportError: x", "does not run, so it was not put in use", "node check mac"),
        ("write", "", "ended with 1", "df -h"),
    ],
)
def test_each_failure_is_told_in_our_words(code: str, log: str, said: str, hint: str) -> None:
    error = failure(MAC, Wanted(), code=code, message="ended with 1", log=log, path="")
    assert error.message.startswith("node mac: ")
    assert said in error.message
    assert hint in error.hint
    assert error.details["log"] == log


def test_a_download_is_told_with_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    line = "Downloading torch-2.13.0%2Bcpu-cp311-none.whl (2.0 kB)"
    installer.tell_download(line)
    (tmp_path / "pip-unpack-x").mkdir()
    (tmp_path / "pip-unpack-x" / "before.whl").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "pip-unpack-x" / "before.whl", (1.0, 1.0))
    (tmp_path / "pip-unpack-x" / "torch.whl").write_bytes(b"x" * 500)
    installer.tell_download(line)
    installer.tell_download("Collecting torch")
    said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert said == [{"line": line, "share": 0.0}, {"line": line, "share": 0.25}]


def test_a_second_installation_waits_for_the_first_and_says_so(
    place: Place, capfd: Captured
) -> None:
    order = ["import sys; from pathlib import Path; from rbee.nodes.installer import *",
             "with locked(Place(Path(sys.argv[1]))): say(step='in')"]  # fmt: skip
    argv = [sys.executable, "-c", "\n".join(order), str(place.link)]
    with installer.locked(place):
        second = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert json.loads(second.stdout.readline())["step"] == "wait"
    said, _ = second.communicate()
    assert json.loads(said) == {"step": "in"}
    assert capfd.readouterr().out == ""


def test_torch_is_that_of_the_makefile() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"TORCH ?= {install.TORCH}\n" in makefile
    assert f"TORCH_CPU_INDEX ?= {TORCH_CPU_INDEX}\n" in makefile
