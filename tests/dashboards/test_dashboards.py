"""Dashboards and alerts: what is committed is what the list of metrics gives, and programs that will read it can."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.metrics.registry import METRICS

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "dashboards" / "grafana"
ALERTS = ROOT / "dashboards" / "prometheus" / "alerts.yml"
NAMES = ("run.json", "model.json", "ranks.json")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Prometheus) is not installed")


def exported_names() -> set[str]:
    """Every name that a scrape may have."""
    return {f"{metric.exported}{'' if metric.kind == 'gauge' else '_total'}" for metric in METRICS if metric.exported}


def expressions(name: str) -> Iterator[tuple[str, str]]:
    """(panel, PromQL) of a committed dashboard, Grafana's variables filled in."""

    def panels(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in items:
            yield item
            yield from panels(item.get("panels") or [])

    for panel in panels(json.loads((GRAFANA / name).read_text(encoding="utf-8"))["panels"]):
        for target in panel.get("targets") or ():
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$run", ".*")


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def generator() -> Any:
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    spec = spec_from_file_location("dashboards_generate", ROOT / "dashboards" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_dashboards_are_the_generated_ones() -> None:
    made = generator()
    assert sorted(path.name for path in GRAFANA.iterdir()) == sorted(NAMES) == sorted(made.DASHBOARDS)
    for name, make in made.DASHBOARDS.items():
        assert (GRAFANA / name).read_text(encoding="utf-8") == made.text(make()), "run dashboards/generate.py"


@pytest.mark.parametrize("name", NAMES)
def test_grafanas_own_types_know_every_key(name: str) -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    raw = json.loads((GRAFANA / name).read_text(encoding="utf-8"))

    def round_trip(content: dict[str, Any]) -> Any:
        return json.loads(json.dumps(Dashboard.from_json(content), cls=JSONEncoder))

    assert round_trip(raw) == raw
    assert round_trip(raw | {"refersh": "1s"}) != raw | {"refersh": "1s"}  # a wrong key would have been seen


def test_every_exported_metric_has_a_panel_and_every_name_exists() -> None:
    drawn = {found for name in NAMES for _, expr in expressions(name) for found in re.findall(r"headrace_\w+", expr)}
    assert drawn == exported_names()
    watched = {found for rule in alerts() for found in re.findall(r"headrace_\w+", rule["expr"])}
    assert watched <= exported_names()


@needs_promtool
def test_promtool_parses_every_query(tmp_path: Path) -> None:
    queries = [expr for name in NAMES for _, expr in expressions(name)]
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(queries)} rules found" in done.stdout


@needs_promtool
def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], cwd=ALERTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_described_and_has_a_runbook() -> None:
    tests = yaml.safe_load((ALERTS.parent / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for rule in alerts():
        name = rule["alert"]
        expected = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == name]
        assert True in expected, f"{name}: no test that it fires"
        assert False in expected, f"{name}: no test that it keeps still"
        assert f"| `{name}` | {rule['labels']['severity']} |" in page, f"docs/monitoring.md does not tell of {name}"
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path in ("docs/operations.md", "docs/recovery.md")
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    told = set(re.findall(r"^\| `(Headrace\w+)` \|", page, re.MULTILINE))
    assert told == {rule["alert"] for rule in alerts()}
