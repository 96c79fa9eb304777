"""Usage: what every attempt used and cost, in a ledger of days whose sums are always those of its entries."""

from promptmill.usage.booker import Booker
from promptmill.usage.booking import add_late_try, book, keep_try, sweep_unbooked, tell_asking
from promptmill.usage.estimates import estimated_usage, settled_usage
from promptmill.usage.prices import price, warm

__all__ = [
    "Booker",
    "add_late_try",
    "book",
    "estimated_usage",
    "keep_try",
    "price",
    "settled_usage",
    "sweep_unbooked",
    "tell_asking",
    "warm",
]
