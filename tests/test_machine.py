"""What the kernel tells of this machine's memory."""

from __future__ import annotations

import os
from pathlib import Path

from rbee.machine import Memory, cgroup_memory, node_memory

NODE = """\
Node 1 MemTotal:       1000 kB
Node 1 MemFree:         100 kB
Node 1 Active(file):     20 kB
Node 1 Inactive(file):    3 kB
Node 1 SReclaimable:      4 kB
Node 1 Dirty:           500 kB
"""


def test_a_node_has_what_is_free_and_what_can_be_dropped(tmp_path: Path) -> None:
    node = tmp_path / f"cpu{min(os.sched_getaffinity(0))}" / "node1"
    assert node_memory(tmp_path) is None
    node.mkdir(parents=True)
    (node / "meminfo").write_text(NODE)
    assert node_memory(tmp_path) == Memory(1000 * 1024, 127 * 1024)


def test_a_container_has_its_limit_less_what_it_uses(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) is None
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 50\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert cgroup_memory(tmp_path) == Memory(1000, 450)
    (tmp_path / "memory.max").write_text("max\n")
    assert cgroup_memory(tmp_path) is None


def test_this_machine_tells_something_sane() -> None:
    for found in (node_memory(), cgroup_memory()):
        assert found is None or 0 <= found.available <= found.total
