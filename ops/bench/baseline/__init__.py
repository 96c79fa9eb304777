"""The obvious implementation, as people write it by hand: the yardstick of the benchmark.

A Celery task on the gevent pool streams from the provider and publishes each token to a Redis channel; a Starlette
relay opens one pub/sub connection a reader. It is a competent version: shared clients with wide enough pools, uvloop
and httptools, no result backend. Its known weaknesses (a reader that subscribes late loses tokens, one that subscribes
after the end waits for ever) are those of the pattern and are left in: the benchmark counts them.
"""
