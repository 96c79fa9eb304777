"""Write the rules as objects of the Prometheus operator: ``python -m ops.prometheus.make``.

The operator reads no files, so what it gets is made of those that Prometheus itself reads. A test compares what is
written with what is committed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

RULES: Final = Path(__file__).parent / "rules"
WRITTEN: Final = Path(__file__).parents[1] / "kubernetes" / "monitoring" / "rules.yaml"
_HEADER: Final = "# Written by `python -m ops.prometheus.make` from ops/prometheus/rules, where the comments are.\n"


class _Dumper(yaml.SafeDumper):
    """Text of several lines stays text of several lines."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def objects() -> list[dict[str, Any]]:
    """A PrometheusRule for each file of rules."""
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {
                "name": f"promptmill-{path.stem}",
                "labels": {"app.kubernetes.io/name": "promptmill"},
            },
            "spec": yaml.safe_load(path.read_text()),
        }
        for path in sorted(RULES.glob("*.yml"))
    ]


def text() -> str:
    """The file with all of them."""
    return _HEADER + yaml.dump_all(objects(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def main() -> None:
    """Write it."""
    WRITTEN.write_text(text())


if __name__ == "__main__":
    main()
