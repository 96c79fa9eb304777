"""Health of models and hosts across all workers, and the limits that they hold together.

A worker asks :meth:`Traffic.admit` before each call of a model and tells :meth:`Traffic.report` how it ended. What one
worker learns (a cooldown, a smaller cap) holds for all.
"""

from promptmill.rates import RateInfo, RateWindow
from promptmill.traffic.control import Traffic
from promptmill.traffic.health import Cooldown
from promptmill.traffic.rules import Admission, Rules

__all__ = ["Admission", "Cooldown", "RateInfo", "RateWindow", "Rules", "Traffic"]
