"""What the monitoring of the compose stack reads: it fits the services, and Prometheus and Alertmanager accept it.

Grafana is not started: no registry that the tests can reach has it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.compose import environment_of, load, ours
from tests.support.docs import ROOT
from tests.support.promql import alerts, program

COMPOSE = load()
PROMETHEUS = ROOT / "ops" / "prometheus" / "prometheus.yml"
ALERTMANAGER = ROOT / "ops" / "alertmanager" / "alertmanager.yml"
PROVISIONING = ROOT / "ops" / "grafana" / "provisioning"


def scrape(job: str) -> dict[str, Any]:
    jobs = yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]
    return next(config for config in jobs if config["job_name"] == job)


def test_every_service_of_ours_is_scraped_on_the_port_of_its_figures() -> None:
    (names,) = scrape("promptmill")["dns_sd_configs"]
    # Flower shows what workers say; it has no figures of its own.
    assert set(names["names"]) == set(ours(COMPOSE)) - {"flower"}
    for name in names["names"]:
        variables = environment_of(COMPOSE["services"][name])
        assert variables["PROMPTMILL_METRICS_PORT"] == str(names["port"])
        assert variables["PROMPTMILL_METRICS_HOST"] == "0.0.0.0"


def test_the_rules_and_the_dashboards_look_for_the_jobs_that_are_scraped() -> None:
    jobs = {config["job_name"] for config in yaml.safe_load(PROMETHEUS.read_text())["scrape_configs"]}
    rules = "".join(path.read_text() for path in (ROOT / "ops" / "prometheus" / "rules").glob("*.yml"))
    asked = set(re.findall(r'job(=~?)"([^"]+)"', rules))
    assert asked
    for how, job in asked:
        assert any(re.fullmatch(job, known) if how == "=~" else job == known for known in jobs), job
    assert list((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is not installed: apt-get install prometheus")
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run(
        [promtool, "check", "config", "--lint-fatal", str(PROMETHEUS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def amtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [program("amtool", package="prometheus-alertmanager"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alerts_reach_the_receiver_of_their_severity() -> None:
    amtool("check-config", ALERTMANAGER)
    for name, rule in alerts().items():
        severity = rule["labels"]["severity"]
        asked = amtool(
            "config", "routes", "test", f"--config.file={ALERTMANAGER}", f"severity={severity}", f"alertname={name}"
        )
        assert asked.strip() == severity, name


def test_what_an_inhibition_names_is_an_alert() -> None:
    rules = yaml.safe_load(ALERTMANAGER.read_text())["inhibit_rules"]
    (cause,) = [re.search('"(.+)"', matcher)[1] for rule in rules for matcher in rule["source_matchers"]]  # type: ignore[index]
    assert cause in alerts()
    (effects,) = [re.search(r"Promptmill\((.+)\)", matcher)[1] for rule in rules for matcher in rule["target_matchers"]]  # type: ignore[index]
    assert {f"Promptmill{effect}" for effect in effects.split("|")} < set(alerts())


def test_the_receivers_that_are_marked_out_are_right_once_the_marks_are_off(tmp_path: Path) -> None:
    secrets = {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()}
    text = re.sub(r"^    # (.*)$", r"    \1", ALERTMANAGER.read_text(), flags=re.MULTILINE)
    named = re.findall(r"/run/secrets/(\w+)", text)
    assert set(named) <= secrets
    for name in named:
        (tmp_path / name).write_text("https://127.0.0.1/alerts")
    file = tmp_path / "alertmanager.yml"
    file.write_text(text.replace("/run/secrets", str(tmp_path)))
    assert {"pagerduty_configs", "slack_configs"} == set(re.findall(r"\w+_configs", text))
    amtool("check-config", file)


def test_prometheus_tells_the_alertmanager_of_the_stack() -> None:
    service = COMPOSE["services"]["alertmanager"]
    (listens,) = [word for word in service["command"] if word.startswith("--web.listen-address=")]
    (target,) = yaml.safe_load(PROMETHEUS.read_text())["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert target == f"alertmanager:{listens.rpartition(':')[2]}"


def test_grafana_asks_the_prometheus_of_the_stack_and_reads_the_mounted_dashboards() -> None:
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    prometheus = COMPOSE["services"]["prometheus"]
    (listens,) = [word for word in prometheus["command"] if word.startswith("--web.listen-address=")]
    assert source["url"] == f"http://prometheus:{listens.rpartition(':')[2]}"
    assert source["isDefault"] is True
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "promptmill.yml").read_text())["providers"]
    mounted = dict(volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"])
    assert mounted["./ops/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./ops/grafana/provisioning"] == "/etc/grafana/provisioning"
