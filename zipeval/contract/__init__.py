"""Check what every method has to keep, on models that are small enough to compare with anything.

`zipeval test-method NAME` runs it, and tests/test_contract.py for each method of zipeval's own.
"""
