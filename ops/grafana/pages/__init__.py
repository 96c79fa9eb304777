"""What the dashboards show, one module each.

Figures with ``:`` in their names are recorded by ``ops/prometheus/rules/recording.yml``.
"""

from __future__ import annotations

from typing import Final

from ops.grafana.pages.models import MODELS
from ops.grafana.pages.overview import OVERVIEW
from ops.grafana.pages.panels import Page, Panel
from ops.grafana.pages.streams import STREAMS
from ops.grafana.pages.workers import WORKERS

__all__ = ["PAGES", "Page", "Panel"]

PAGES: Final = (OVERVIEW, WORKERS, STREAMS, MODELS)
