"""What records say of checkpoints, disk, rejects, restarts and ranks."""

from pathlib import Path

from process_group import run_ranks

from data_scheduler.journal import Journal
from parallel import process_groups
from parallel.layout import Layout
from pretrain.metrics.registry import METRICS, OF_MACHINE, scalars
from pretrain.metrics.vitals import DISK_EVERY_S, Vitals, of_ranks


def test_counts_are_those_of_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    started = journal.append("run_started", 0, {}, "config").time
    now = started + 10.0
    vitals = Vitals(tmp_path, journal, lambda: now)
    first = vitals.read(["code", "prose"])
    assert first["time"] == now
    assert first["checkpoint_age_s"] == 10.0  # none yet: since the start
    assert first["rejects"] == {"code": 0, "prose": 0}  # a first reject must be seen to rise from something
    assert first["restarts"] == first["anomalies"] == first["rollbacks"] == 0
    journal.append("reject", 3, {"records": {"code": 2}}, "system")
    journal.append("reject", 4, {"records": {"code": 1, "late": 1}}, "system")
    journal.append("resumed", 4, {}, "system")
    journal.append("anomaly", 5, {"anomaly": 5, "action": "warned"}, "system")
    journal.append("rollback", 4, {"anomaly": 6}, "system")
    journal.append("anomaly", 6, {"anomaly": 6, "action": "none"}, "system")  # a finding, no further anomaly
    now = journal.append("checkpoint", 8, {"path": "x", "tokens": 1}, "system").time + 3.0
    then = vitals.read(["code", "prose"])
    assert then["checkpoint_age_s"] == 3.0
    assert then["rejects"] == {"code": 3, "prose": 0, "late": 1}
    assert (then["restarts"], then["anomalies"], then["rollbacks"]) == (1, 2, 1)
    journal.close()
    # A process that comes later goes on where the one before it stopped; so it does after a clock was set back.
    later = Vitals(tmp_path, Journal(tmp_path / "journal.jsonl", writable=False), lambda: now - 100.0)
    assert later.read(["code", "prose"]) | {"disk_free_bytes": 0} == {
        **then,
        "time": now - 100.0,
        "checkpoint_age_s": 0.0,
        "disk_free_bytes": 0,
    }


def test_the_file_system_is_not_asked_at_every_step(tmp_path: Path, monkeypatch) -> None:
    asked = []

    class Usage:
        free = 77

    monkeypatch.setattr("pretrain.metrics.vitals.shutil.disk_usage", lambda path: asked.append(path) or Usage)
    now = 0.0
    vitals = Vitals(tmp_path, Journal(), lambda: now)
    for step in range(100):
        now = step * DISK_EVERY_S / 10
        assert vitals.read([])["disk_free_bytes"] == 77
    assert asked == [tmp_path] * 10


def test_each_rank_has_its_own_values() -> None:
    def rank_values() -> dict:
        ranks = process_groups.initialize(Layout(2), seed=1, timeout_s=60)
        return of_ranks(wait_s=0.5 + ranks.rank)

    for record in run_ranks(2, rank_values, timeout_s=120):
        assert record["rank_data_wait_s"] == {"0": 0.5, "1": 1.5}
        assert all(record[name].keys() == {"0", "1"} for name in record)
        assert all(value > 1e6 for value in record["rank_host_memory_bytes"].values())
        assert record.keys() <= OF_MACHINE
        assert not list(scalars(record))  # no chart per rank in the trackers


def test_names_are_told_once_and_in_prometheus_style() -> None:
    names = [metric.name for metric in METRICS]
    exported = [metric.exported for metric in METRICS if metric.exported]
    assert len(set(names)) == len(names)
    assert len(set(exported)) == len(exported)
    for metric in METRICS:
        assert metric.unit or metric.kind == "text"
        assert not metric.exported.endswith("_total")  # the client adds it
        if metric.exported and metric.unit in ("s", "bytes"):
            assert metric.exported.endswith({"s": "_seconds", "bytes": "_bytes"}[metric.unit])
