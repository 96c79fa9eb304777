"""The Kubernetes manifests: put together by Kustomize, valid by the schemas, of one piece. No cluster is at hand."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from promptmill.cli.app import app
from promptmill.settings import Settings, load_settings
from promptmill.settings.secrets import SECRETS
from promptmill_relay.server import HARD_S
from tests.support.kubernetes import FOLDER, build, container, of_kind, selected

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the group manifests, as ops/check has")
keda = pytest.importorskip("cloudcoil.models.keda.v1alpha1")
operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")

CUSTOM = {
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("monitoring.coreos.com/v1", "PodMonitor"): operator.PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): operator.PrometheusRule,
}
VERSIONS = ("1.31", "1.37")
OBJECTS = build()
DEPLOYMENTS = of_kind(OBJECTS, "Deployment")
CONFIGS = of_kind(OBJECTS, "ConfigMap")
WORKERS = {"worker": "api", "worker-claude": "claude", "worker-gemini": "gemini"}
SERVERS = ("gateway", "relay")
HAND_BACK_S = 20


def config(prefix: str) -> dict[str, str]:
    """What a generated ConfigMap holds; a digest stands behind its name."""
    (name,) = [name for name in CONFIGS if name.startswith(f"{prefix}-")]
    return CONFIGS[name]["data"]


def environment(name: str) -> dict[str, str]:
    """All variables of a deployment's container."""
    found: dict[str, str] = {}
    for source in container(DEPLOYMENTS[name]).get("envFrom", []):
        found |= CONFIGS[source["configMapRef"]["name"]]["data"]
    return found | {each["name"]: each["value"] for each in container(DEPLOYMENTS[name]).get("env", [])}


def pod(name: str) -> dict[str, Any]:
    return DEPLOYMENTS[name]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("thing", OBJECTS, ids=lambda o: f"{o['kind']}-{o['metadata']['name']}")
def test_every_object_is_valid_and_names_no_unknown_field(thing: dict[str, Any], version: str) -> None:
    if (thing["apiVersion"], thing["kind"]) in CUSTOM:
        # A field that it does not know is dropped in silence, as by the server; so what comes back is compared.
        wanted = copy.deepcopy(thing)
        # Of KEDA 2.17; the last models for Python 3.11 are of 2.16.
        wanted["spec"].get("fallback", {}).pop("behavior", None)
        for given in (thing, {**thing, "spec": {**thing["spec"], "unheardOf": 1}}):
            known = CUSTOM[thing["apiVersion"], thing["kind"]].model_validate(given)
            assert known.model_dump(mode="json", by_alias=True, exclude_unset=True) == wanted
    else:
        kubernetes_validate.validate(thing, version, strict=True)


def test_every_manifest_belongs_to_a_kustomization() -> None:
    for folder in [FOLDER, *(path for path in FOLDER.iterdir() if path.is_dir())]:
        about = yaml.safe_load((folder / "kustomization.yaml").read_text())
        assert set(about.get("components", [])) <= {path.name for path in FOLDER.iterdir()}
        listed = set(about["resources"]) | {"kustomization.yaml", "secret.example.yaml"}
        assert {path.name for path in folder.glob("*.yaml")} <= listed
    components = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["components"]
    assert {"base", *components} == {path.name for path in FOLDER.iterdir() if path.is_dir()}


def test_the_base_stands_alone() -> None:
    base = build(FOLDER / "base")
    assert set(of_kind(base, "Deployment")) == {"worker", *SERVERS}
    assert not [thing for thing in base if (thing["apiVersion"], thing["kind"]) in CUSTOM]
    assert all("namespace" not in thing["metadata"] for thing in OBJECTS)


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_pods_meet_the_restricted_standard(name: str) -> None:
    spec, only = pod(name), container(DEPLOYMENTS[name])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 10001  # as in the image
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
    assert all(volume.keys() & {"configMap", "secret", "emptyDir"} for volume in spec["volumes"])
    assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)
    assert only["resources"]["requests"].keys() == only["resources"]["limits"].keys() == {"cpu", "memory"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_labels_selectors_budgets_and_spread_fit_each_other(name: str) -> None:
    deployment = DEPLOYMENTS[name]
    labels = deployment["spec"]["selector"]["matchLabels"]
    assert list(selected(OBJECTS, labels)) == [name]
    for constraint in pod(name)["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"] == labels
    budget = of_kind(OBJECTS, "PodDisruptionBudget")[name]["spec"]
    assert budget["selector"]["matchLabels"] == labels
    # With minAvailable a single pod could never be moved.
    assert budget["maxUnavailable"] == 1
    assert pod(name)["serviceAccountName"] in of_kind(OBJECTS, "ServiceAccount")


@pytest.mark.parametrize("name", SERVERS)
def test_services_and_probes_lead_to_ports_that_have_these_names(name: str) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(DEPLOYMENTS[name])["ports"]}
    service = of_kind(OBJECTS, "Service")[name]["spec"]
    assert list(selected(OBJECTS, service["selector"])) == [name]
    assert [port["targetPort"] for port in service["ports"]] == ["http"]
    assert environment(name)["PROMPTMILL_PORT"] == str(ports["http"])
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        # Not /readyz: an outage of Redis must neither restart a server nor take all of them from their Service.
        assert container(DEPLOYMENTS[name])[probe]["httpGet"] == {"path": "/healthz", "port": "http"}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_figures_are_served_where_they_are_looked_for(name: str) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(DEPLOYMENTS[name])["ports"]}
    assert environment(name)["PROMPTMILL_METRICS_PORT"] == str(ports["metrics"])
    monitor = of_kind(OBJECTS, "PodMonitor")["promptmill"]["spec"]
    assert name in selected(OBJECTS, monitor["selector"]["matchLabels"])
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]
    # The alerts look for this job.
    labels = DEPLOYMENTS[name]["spec"]["template"]["metadata"]["labels"]
    assert labels[monitor["jobLabel"]] == "promptmill"


@pytest.mark.parametrize(("name", "family"), WORKERS.items())
def test_a_workers_probes_ask_for_its_own_family_and_nothing_restarts_it(name: str, family: str) -> None:
    only = container(DEPLOYMENTS[name])
    assert only["args"] == (["worker"] if family == "api" else ["worker", "--family", family])
    for probe in ("startupProbe", "readinessProbe"):
        assert only[probe]["exec"]["command"] == ["python", "/opt/promptmill/can_claim.py", family]
        assert only[probe]["timeoutSeconds"] >= 10  # it starts a Python
    assert "livenessProbe" not in only


def test_every_pod_has_more_time_to_end_than_it_takes() -> None:
    for name in WORKERS:
        drain_s = float(environment(name)["PROMPTMILL_DRAIN_S"])
        assert pod(name)["terminationGracePeriodSeconds"] >= drain_s + HAND_BACK_S + 5
    for name in SERVERS:
        stop = container(DEPLOYMENTS[name])["lifecycle"]["preStop"]["exec"]["command"]
        assert stop[0] == "sleep"
        assert pod(name)["terminationGracePeriodSeconds"] >= float(stop[1]) + HARD_S + 5


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_what_is_run_is_a_command_with_valid_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = container(DEPLOYMENTS[name])
    assert only["args"][0] in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {f"PROMPTMILL_{field.upper()}" for field in Settings.model_fields}
    known |= {f"PROMPTMILL_{secret.upper()}_FILE" for secret in SECRETS} | {"PROMPTMILL_CONFIG"}
    assert set(environment(name)) <= known
    mounts = {mount["name"]: mount["mountPath"] for mount in only["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod(name)["volumes"]}
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    held = CONFIGS[volumes["config"]["configMap"]["name"]]["data"]
    items = {item["path"] for item in volumes["secrets"]["secret"]["items"]}
    for path in ("etc", "secrets"):
        (tmp_path / path).mkdir()
    for file, text in held.items():
        (tmp_path / "etc" / file).write_text(text)
    for item in items:
        (tmp_path / "secrets" / item).write_text("secret")
    for variable, value in environment(name).items():
        here = value.replace(mounts["config"], str(tmp_path / "etc"))
        monkeypatch.setenv(variable, here.replace(mounts["secrets"], str(tmp_path / "secrets")))
    settings = load_settings()
    assert settings.store_url == "redis://:secret@redis:6379/0"
    if name in SERVERS:
        assert settings.keys_by_user() == {"default": "secret"}
    else:
        assert WORKERS[name] in settings.served_families
        # The key of its own family's provider is there, and no other.
        files = {
            model.api_key_file.name
            for model in settings.models.values()
            if model.worker_family == WORKERS[name] and model.api_key_file
        }
        assert items == {"redis_password", *files}


def test_the_example_of_the_secret_has_every_key_that_a_pod_mounts() -> None:
    example = yaml.safe_load((FOLDER / "secret.example.yaml").read_text())
    kubernetes_validate.validate(example, VERSIONS[-1], strict=True)
    keys = {
        (volume["secret"]["secretName"], item["key"])
        for name in DEPLOYMENTS
        for volume in pod(name)["volumes"]
        if "secret" in volume
        for item in volume["secret"]["items"]
    }
    assert keys == {(example["metadata"]["name"], key) for key in example["stringData"]}
    assert set(example["stringData"].values()) == {"…"}


def test_a_change_of_the_configuration_starts_new_pods() -> None:
    for name in CONFIGS:
        assert re.fullmatch(r"promptmill-(config|environment)-[a-z0-9]{10}", name)
    assert "models.claude" in config("promptmill-config")["promptmill.toml"]


def test_the_network_admits_servers_ports_and_figures_and_lets_workers_alone_out() -> None:
    policies = of_kind(OBJECTS, "NetworkPolicy")
    everyone = policies["promptmill"]["spec"]
    assert set(selected(OBJECTS, everyone["podSelector"]["matchLabels"])) == set(DEPLOYMENTS)
    assert set(everyone["policyTypes"]) == {"Ingress", "Egress"}
    assert [port["port"] for rule in everyone["ingress"] for port in rule["ports"]] == ["metrics"]
    assert {port["port"] for rule in everyone["egress"] for port in rule["ports"]} == {53, 6379, 5672}

    def components(policy: str) -> set[str]:
        return {
            value
            for expression in policies[policy]["spec"]["podSelector"]["matchExpressions"]
            if expression["key"] == "app.kubernetes.io/component"
            for value in expression["values"]
        }

    assert components("promptmill-servers") == set(SERVERS)
    assert components("promptmill-workers") == set(WORKERS)


def test_what_scales_exists_and_its_number_is_set_by_nobody_else() -> None:
    scaled = of_kind(OBJECTS, "ScaledObject")
    assert set(scaled) == set(DEPLOYMENTS) - {"gateway"}
    for name, about in scaled.items():
        assert about["spec"]["scaleTargetRef"] == {"name": name}
        assert "replicas" not in DEPLOYMENTS[name]["spec"]
        assert about["spec"]["minReplicaCount"] <= about["spec"]["fallback"]["replicas"]
        (trigger,) = about["spec"]["triggers"]
        assert trigger["metadata"]["ignoreNullValues"] == "false"
        if name in WORKERS:
            assert set(re.findall(r'family="([\w-]+)"', trigger["metadata"]["query"])) == {WORKERS[name]}
            concurrency = Settings().concurrency_of(WORKERS[name])
            assert int(trigger["metadata"]["threshold"]) <= concurrency
    assert DEPLOYMENTS["gateway"]["spec"]["replicas"] == 2


def test_the_queries_answer_what_they_are_to_by_prometheus_itself(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is not installed: apt-get install prometheus")
        pytest.skip("promtool is not installed: apt-get install prometheus")
    queries = {
        name: about["spec"]["triggers"][0]["metadata"]["query"]
        for name, about in of_kind(OBJECTS, "ScaledObject").items()
    }
    series: list[dict[str, str]] = []
    for family in WORKERS.values():
        for gateway in ("a", "b"):  # each tells the whole
            for priority, waits in (("interactive", 30), ("batch", 10)):
                labels = f'family="{family}", priority="{priority}", instance="{gateway}"'
                series.append({"series": f"promptmill_queue_jobs{{{labels}}}", "values": str(waits)})
            labels = f'family="{family}", instance="{gateway}"'
            series.append({"series": f"promptmill_fleet_running_jobs{{{labels}}}", "values": "5"})
    for relay in ("c", "d"):
        labels = f'service="relay", instance="{relay}"'
        series.append({"series": f"promptmill_readers{{{labels}}}", "values": "700"})
    expected = {"relay": 1400, **dict.fromkeys(WORKERS, 45)}
    tests = [
        {"expr": query, "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": expected[name]}]}
        for name, query in queries.items()
    ]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": tests}]}))
    done = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
