"""What Prometheus and Grafana of the compose stack read: it fits the services, and Prometheus itself accepts it.

Grafana is not started: no registry that the tests can reach has it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.support.compose import environment_of, load, ours
from tests.support.docs import ROOT

COMPOSE = load()
PROMETHEUS = ROOT / "ops" / "prometheus" / "prometheus.yml"
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
