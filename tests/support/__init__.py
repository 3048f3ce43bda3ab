"""Helpers that tests share: servers, faults, clocks, commands, records and checks.

The fixtures in `conftest.py` have most of it; what is no fixture is imported from its
module here.
"""
