"""Wheels of what is installed: of this rbee, and of whatever pip has put somewhere."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import rbee
from rbee import __version__
from rbee.errors import MachineError
from rbee.nodes.wheel import pack, pack_running

INFO = "Some_Tool-1.2.dist-info"
SITE = "lib/python3.11/site-packages"
FILES = {
    f"{SITE}/some_tool/__init__.py": "x = 1\n",
    f"{SITE}/some_tool/__pycache__/__init__.cpython-311.pyc": "",
    f"{SITE}/{INFO}/METADATA": "Metadata-Version: 2.1\nName: Some.Tool\nVersion: 1.2\n",
    f"{SITE}/{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nBuild: 3\n"
    "Tag: cp311-abi3-manylinux_2_17_x86_64\nTag: cp311-abi3-manylinux2014_x86_64\n",
    f"{SITE}/{INFO}/entry_points.txt": "[console_scripts]\nsome-tool = some_tool:main\n",
    f"{SITE}/{INFO}/INSTALLER": "pip\n",
    f"{SITE}/{INFO}/direct_url.json": "{}",
    "bin/some-tool": f"#!{sys.prefix}/bin/python\nmade by pip\n",
    "bin/some-script": f"#!{sys.prefix}/bin/python\nprint('shipped')\n",
    "bin/some-shell": "#!/bin/sh\necho shipped\n",
    "share/man/man1/some.1": "manual\n",
}


def lay_out(prefix: Path) -> PathDistribution:
    """Put files where pip would, with its RECORD."""
    for name, text in FILES.items():
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    places = [
        name.removeprefix(f"{SITE}/") if name.startswith(SITE) else f"../../../{name}"
        for name in [*FILES, f"{SITE}/{INFO}/RECORD"]
    ]
    record = prefix / SITE / INFO / "RECORD"
    record.write_text("".join(f"{place},,\n" for place in places))
    return PathDistribution(record.parent)


def contents(wheel: Path) -> dict[str, bytes]:
    """Read a wheel; its RECORD must tell the truth about all of it."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (record,) = [name for name in files if name.endswith(".dist-info/RECORD")]
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(files[record].decode()))}
    assert rows.keys() == files.keys()
    assert rows.pop(record) == ["", ""]
    for name, (digest, size) in rows.items():
        found = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=")
        assert (digest, int(size)) == (f"sha256={found.decode()}", len(files[name]))
    return files


def test_what_pip_has_installed_becomes_the_wheel_that_it_was(tmp_path: Path) -> None:
    wheel = pack(lay_out(tmp_path / "venv"), tmp_path)
    tags = "manylinux_2_17_x86_64.manylinux2014_x86_64"
    assert wheel.path.name == f"Some_Tool-1.2-3-cp311-abi3-{tags}.whl"
    files = contents(wheel.path)
    assert files.keys() == {
        "some_tool/__init__.py", f"{INFO}/METADATA", f"{INFO}/WHEEL", f"{INFO}/entry_points.txt",
        f"{INFO}/RECORD", "Some_Tool-1.2.data/scripts/some-script",
        "Some_Tool-1.2.data/scripts/some-shell", "Some_Tool-1.2.data/data/share/man/man1/some.1",
    }  # fmt: skip
    assert files["Some_Tool-1.2.data/scripts/some-script"] == b"#!python\nprint('shipped')\n"
    assert files["Some_Tool-1.2.data/scripts/some-shell"].startswith(b"#!/bin/sh\n")


def test_what_lacks_a_file_or_a_record_makes_no_wheel(tmp_path: Path) -> None:
    found = lay_out(tmp_path / "venv")
    (tmp_path / "venv" / SITE / "some_tool/__init__.py").unlink()
    with pytest.raises(MachineError, match=r"some_tool/__init__\.py: No such file"):
        pack(found, tmp_path)
    (tmp_path / "venv" / SITE / INFO / "RECORD").unlink()
    with pytest.raises(MachineError, match="has left no RECORD"):
        pack(found, tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def test_this_rbee_is_packed_with_all_it_consists_of(tmp_path: Path) -> None:
    wheel = pack_running(tmp_path)
    assert wheel.path.name == f"rbee-{__version__}-py3-none-any.whl"
    files = contents(wheel.path)
    package = Path(rbee.__file__).parent
    sources = {str(path.relative_to(package.parent)) for path in package.rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == sources
    info = f"rbee-{__version__}.dist-info"
    assert {f"{info}/METADATA", f"{info}/entry_points.txt"} <= files.keys()
    assert not any("direct_url" in name or name.endswith((".pth", ".pyc")) for name in files)
    (tmp_path / "again").mkdir()
    assert pack_running(tmp_path / "again").digest == wheel.digest


def test_a_tree_that_is_newer_than_its_installation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rbee, "__version__", "9.9")
    with pytest.raises(MachineError, match=rf"is 9\.9, its installation says {__version__}"):
        pack_running(tmp_path)
