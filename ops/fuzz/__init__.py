"""Fuzzing: the HTTP interface by its own description, and the framers that read what providers and programs write."""
