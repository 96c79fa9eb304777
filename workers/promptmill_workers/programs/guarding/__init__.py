"""The processes between a worker and its programs: standard library only, as few imports as can be.

A *warden* per worker process (:mod:`.warden`) forks a *guard* per program (:mod:`.guard`). The package is run as
``PYTHON -I -S …/guarding/__main__.py FD ROOT`` and imported there by its short name, ``guarding``, so that nothing of
the worker's packages is loaded: the warden is up in about 40 ms, and a guard in a few.
"""
