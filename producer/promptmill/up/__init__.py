"""``promptmill up``: an embedded store, workers and a gateway as one process tree that dies whole."""
