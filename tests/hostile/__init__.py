"""Attacks on a running server, by module. Each is a function of a URL that returns what it measured.

By hand: ``python -m tests.hostile NAME --url http://127.0.0.1:8000``.
"""
