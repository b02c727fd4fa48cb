from __future__ import annotations

import json

import pytest

from rbee.home import Home
from rbee.keeper.app import run_line
from rbee.models.reference import BUILT_IN


def test_aliases_are_shown_with_where_they_lead_and_come_from(
    home: Home, capfd: pytest.CaptureFixture[str]
) -> None:
    home.config_file.write_text(
        "[aliases]\na = 'b'\nb = 'a'\n"
        "[aliases.tinyllama]\nsource = ['tinyllama', 'pypi:x']\nseed = 1\n"
    )
    assert run_line(["model", "aliases", "--json"]) == 0
    rows = {row["alias"]: row for row in json.loads(capfd.readouterr().out)}
    assert set(rows) == {"a", "b", *BUILT_IN}
    assert rows["tinyllama"] == {
        "alias": "tinyllama",
        "sources": [*BUILT_IN["tinyllama"], "pypi:x"],
        "from": str(home.config_file),
        "defaults": {"seed": 1},
        "error": "",
    }
    assert rows["qwen3-4b"]["from"] == "built in"
    assert "leads back to itself" in rows["a"]["error"]
    assert run_line(["model", "aliases"]) == 0
    out = capfd.readouterr().out
    assert "hf:Qwen/Qwen3-0.6B" in out
    assert "error: alias 'a' leads back" in out
