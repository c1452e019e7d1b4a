"""Reading the machine: advice where it stands in the way, and a doctor that fails where it must."""

from __future__ import annotations

import os

import pytest

from qpool.executors import topology
from qpool.measure import doctor, host


def by_name() -> dict[str, host.Finding]:
    return {finding.name: finding for finding in host.findings()}


def test_this_machine() -> None:
    found = by_name()
    assert {"processor", "ours", "NUMA nodes", "memory", "allocator"} <= set(found)
    assert all(finding.value for finding in found.values())
    assert all(bool(f.advice) == (f.status != "ok") for f in found.values())


def test_a_quota_below_the_cores_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        topology, "budget", lambda: topology.Budget((0, 1, 2, 3), 4, 1.5, ((0, 1), (2, 3)))
    )
    found = by_name()
    assert found["ours"].status == "advice"
    assert "quota of 1.5 CPUs: 1 workers" in found["ours"].value
    assert found["NUMA nodes"].value.startswith("2, of 2, 2 CPUs")


def test_frequency_and_pages(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    cpufreq = tmp_path / "cpu0" / "cpufreq"
    cpufreq.mkdir(parents=True)
    (cpufreq / "scaling_governor").write_text("powersave\n")
    (cpufreq / "scaling_driver").write_text("acpi-cpufreq\n")
    (tmp_path / "cpufreq").mkdir()
    (tmp_path / "cpufreq" / "boost").write_text("0\n")
    throttle = tmp_path / "cpu0" / "thermal_throttle"
    throttle.mkdir()
    (throttle / "core_throttle_count").write_text("7\n")
    pages = tmp_path / "enabled"
    pages.write_text("always madvise [never]\n")
    monkeypatch.setattr(host, "_CPUS", tmp_path)
    monkeypatch.setattr(host, "_HUGE_PAGES", pages)
    found = by_name()
    assert found["scaling governor"].status == "advice"
    assert found["turbo"].value == "off"
    assert found["transparent huge pages"].status == "advice"
    (cpufreq / "scaling_driver").write_text("intel_pstate\n")  # whose powersave is no brake
    assert by_name()["scaling governor"].status == "ok"
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "cgroup" / "cpu.stat").write_text("nr_throttled 3\nthrottled_usec 2500000\n")
    monkeypatch.setattr(topology, "cgroup", lambda: tmp_path / "cgroup")
    assert host.throttling() == (2.5, 7)


def test_an_allocator_that_was_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert by_name()["allocator"].value == "jemalloc"


def test_what_is_wrong_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        raise ImportError("no module named 'strawberryfields'")

    monkeypatch.setattr(doctor, "_strawberry_fields", broken)
    monkeypatch.setattr(doctor, "_parallel", lambda workers: host.Finding("parallel step", "fine"))
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["Strawberry Fields"].status == "wrong"
    assert "ImportError: no module" in found["Strawberry Fields"].value
    assert found["traced engine"].status == "ok"
    assert "from stock" in found["traced engine"].value
