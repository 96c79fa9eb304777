"""The benchmark: promptmill beside the obvious implementation and beside reading the provider directly.

``python -m ops.bench`` runs everything on this machine against the provider simulator and prints one table a scenario.
"""
