"""Write the Grafana dashboards beside this file: ``python -m ops.grafana.make``.

Panels stand here as what they ask and what that means; where they stand on the page, and all that Grafana wants beside,
is the same for each. A test compares what is written with what is committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ops.grafana import pages

DASHBOARDS: Final = Path(__file__).parent / "dashboards"
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WIDE: Final = 24
_VARIABLES: Final = {
    "family": "label_values(promptmill_fleet_slots, family)",
    "model": "label_values(promptmill_attempts_total, model)",
    "instance": "label_values(promptmill_loop_lag_seconds_count, instance)",
}


@dataclass
class _Place:
    """Where the next panel goes: in lines from left to right, each as high as its highest panel."""

    x: int = 0
    y: int = 0
    height: int = 0

    def take(self, width: int, height: int) -> dict[str, int]:
        if self.x + width > _WIDE:
            self.x, self.y, self.height = 0, self.y + self.height, 0
        taken = {"h": height, "w": width, "x": self.x, "y": self.y}
        self.x, self.height = self.x + width, max(self.height, height)
        return taken


def dashboard(page: pages.Page) -> dict[str, Any]:
    """A page as Grafana reads it."""
    place = _Place()
    return {
        "uid": f"promptmill-{page.name}",
        "title": f"promptmill: {page.title}",
        "description": page.description,
        "tags": ["promptmill"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards",
                "tags": ["promptmill"],
                "title": "promptmill",
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "annotations": {"list": []},
        "templating": {"list": list(_variables(page))},
        "panels": [_panel(number, panel, place) for number, panel in enumerate(page.panels, start=1)],
    }


def _variables(page: pages.Page) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1}
    for name in page.variables:
        yield {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": _VARIABLES[name], "refId": name},
            "definition": _VARIABLES[name],
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
            "refresh": 2,
            "sort": 1,
        }


def _panel(number: int, panel: pages.Panel, place: _Place) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": place.take(panel.width, panel.height),
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": expr,
                "legendFormat": legend,
                "instant": panel.kind != "timeseries",
                "range": panel.kind == "timeseries",
                **({"format": "table"} if panel.kind == "table" else {}),
            }
            for index, (expr, legend) in enumerate(panel.asks)
        ],
    }
    if panel.kind == "table":
        hidden = dict.fromkeys(("Time", "Value", "__name__", "alertstate", "job"), True)
        made["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return made


def _defaults(panel: pages.Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.kind == "timeseries":
        mode = "normal" if panel.stacked else "none"
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": mode, "group": "A"},
        }
    if panel.bad is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.bad}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["color"] = {"mode": "thresholds"}
    return defaults


_OPTIONS: Final[dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"], "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "auto",
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
}


def main() -> None:
    """Write them all."""
    for page in pages.PAGES:
        (DASHBOARDS / f"{page.name}.json").write_text(text(page))


def text(page: pages.Page) -> str:
    """The file of a page."""
    return json.dumps(dashboard(page), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
