"""The chaos suite: real parts, faults drawn from a seed, and a ledger that is checked at the end.

``python -m ops.chaos --preset short`` starts a store, workers, a gateway, a relay and the provider simulator, submits
jobs, reads every one of them, and meanwhile kills, freezes, cuts and restarts. What was submitted and what each reader
saw is written to a file; the checks compare it with what the store, the provider and the machine say at the end.
"""
