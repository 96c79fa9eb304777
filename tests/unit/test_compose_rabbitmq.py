"""The second compose file, which adds RabbitMQ, as far as it can be checked without a container engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from promptmill.settings import Settings

ROOT = Path(__file__).parents[2]
FIRST: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
TEXT = (ROOT / "ops" / "compose.rabbitmq.yaml").read_text()
SECOND: dict[str, Any] = yaml.safe_load(TEXT)


def test_it_adds_the_broker_and_changes_what_is_there_already() -> None:
    assert set(SECOND["services"]) == {"rabbitmq", "worker", "gateway"}
    assert "rabbitmq" not in FIRST["services"]
    # Like the store, it is not published and is checked.
    assert "ports" not in SECOND["services"]["rabbitmq"]
    assert SECOND["services"]["rabbitmq"]["healthcheck"]["test"][0] == "CMD"


def test_all_who_send_or_take_messages_are_given_its_address_and_wait_for_it() -> None:
    for name in ("worker", "gateway"):
        service = SECOND["services"][name]
        assert service["depends_on"]["rabbitmq"]["condition"] == "service_healthy"
        filled = re.sub(r"\$\{\w+:\?[^}]*\}", "secret", service["environment"]["PROMPTMILL_BROKER_URL"])
        assert Settings(broker_url=filled).queue_url == "amqp://promptmill:secret@rabbitmq:5672//"


def test_its_password_has_no_default_and_is_the_one_in_the_address() -> None:
    assert set(re.findall(r"\$\{RABBITMQ_PASSWORD(:.)", TEXT)) == {":?"}
    broker = SECOND["services"]["rabbitmq"]["environment"]
    assert broker["RABBITMQ_DEFAULT_USER"] == "promptmill"
    assert broker["RABBITMQ_DEFAULT_PASS"].startswith("${RABBITMQ_PASSWORD")


def test_its_data_is_on_a_volume_of_the_file() -> None:
    sources = {volume.split(":")[0] for volume in SECOND["services"]["rabbitmq"]["volumes"]}
    assert sources == set(SECOND["volumes"])
