"""HostProbe: control groups, peaks, and errors without /proc."""

from __future__ import annotations

import types

import pytest
import torch

from autobatch._memory.host import HostProbe
from autobatch.errors import ProbeError
from kernel_files import group, machine, old_group
from nvml_standin import tensor_on


def test_without_control_groups_the_kernel_files_count(tmp_path):
    probe = HostProbe(machine(tmp_path))

    reading = probe.read()

    assert (reading.total, reading.used, reading.reserved) == (
        1000 * 1024,
        400 * 1024,
        60 * 1024,
    )
    assert probe.source == str(tmp_path / "proc/meminfo")


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        ("0::/box/job\n", group("box/job", limit=300, usage=200, cache=80)),
        (
            "0::/box/job\n",
            group("box", limit=300, usage=200, cache=80) | group("box/job", limit="max", usage=90),
        ),
        (
            "0::/box/job\n",
            group("box", limit=300, usage=200, cache=80) | group("box/job", limit=900, usage=90),
        ),
        ("0::/\n", group("", limit=300, usage=200, cache=80)),
        ("0::/../../box\n", group("box", limit=300, usage=200, cache=80)),
        (
            "9:cpu:/x\n4:memory:/box/job\n0::/\n",
            old_group("box/job", limit=300, usage=200, cache=80),
        ),
        (
            "4:hugetlb,memory:/box/job\n",
            old_group("box", limit=300, usage=200, cache=80),
        ),
        (
            "4:memory:/docker/not-visible-in-here\n",
            old_group("", limit=300, usage=200, cache=80),
        ),
    ],
    ids=[
        "own",
        "parent",
        "tighter parent",
        "namespace",
        "outside",
        "version 1",
        "version 1 parent",
        "version 1 box",
    ],
)
def test_the_tightest_control_group_counts(tmp_path, groups, files):
    probe = HostProbe(machine(tmp_path, groups=groups, files=files))

    reading = probe.read()

    assert reading.total == 300 * 1024
    assert reading.used == 120 * 1024, "cache that can be reclaimed is not used"
    assert probe.source.startswith("the memory limit of control group /")


def test_a_control_group_larger_than_the_machine_is_ignored(tmp_path):
    probe = HostProbe(
        machine(tmp_path, groups="0::/job\n", files=group("job", limit=5000, usage=100))
    )

    assert probe.read().total == 1000 * 1024
    assert probe.source == str(tmp_path / "proc/meminfo")


def test_a_control_group_has_at_most_the_free_memory_of_the_machine(tmp_path):
    files = group("job", limit=300, usage=100)
    probe = HostProbe(machine(tmp_path, available=50, groups="0::/job\n", files=files))

    reading = probe.read()

    assert reading.total - reading.used == 50 * 1024


def test_an_old_kernel_is_read_by_the_resident_set(
    tmp_path,
):
    root = machine(tmp_path)
    (root / "proc/self/status").write_text("VmPeak:\t 999 kB\nVmRSS:\t 70 kB\n")

    assert HostProbe(root).read().reserved == 70 * 1024


@pytest.mark.parametrize(
    ("missing", "unknown"),
    [
        ("proc/meminfo", "how much memory there is"),
        ("proc/self/status", "this process holds"),
    ],
)
def test_a_system_without_proc_raises_a_probe_error(tmp_path, missing, unknown):
    (machine(tmp_path) / missing).unlink()

    with pytest.raises(
        ProbeError,
        match=rf"{missing} does not say .*{unknown}.* Pass device= a MemoryProbe",
    ):
        HostProbe(tmp_path)


def test_the_peak_is_the_size_at_the_start_plus_new_tensors(
    tmp_path,
):
    root = machine(tmp_path, anonymous=5000, shared=0)
    probe = HostProbe(root)
    model = torch.nn.Linear(8, 8)
    probe.attach(model)
    assert probe.read().peak == 5000 * 1024

    with probe.limited(6000 * 1024) as watch:
        watch.mark()
        with tensor_on("cpu", 400 * 1024):
            machine(root, anonymous=9000, shared=0)
        watch.mark()

    assert probe.read().peak == (5000 + 400) * 1024
    assert watch.profile == ((5000 + 400) * 1024,)


def test_attached_tensors_count_once_against_the_budget(tmp_path):
    probe = HostProbe(machine(tmp_path, anonymous=5000, shared=0))
    kept = torch.zeros(3000 * 1024, dtype=torch.uint8)
    probe.attach(kept)

    with probe.limited(5500 * 1024), tensor_on("cpu", 500 * 1024):
        pass
    with (
        pytest.raises(torch.OutOfMemoryError),
        probe.limited(5500 * 1024),
        tensor_on("cpu", 501 * 1024),
    ):
        pass


def test_release_works_without_malloc_trim(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: types.SimpleNamespace())

    HostProbe().release()
