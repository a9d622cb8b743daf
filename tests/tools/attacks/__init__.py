"""Attacks on the commands, run by `tests/tools/hostile.py`.

Every module whose name ends in `_cases` is a table of `Case`s: a command line, the files to damage first, and
the allowed exit codes. `runner` runs cases in a `sandbox`, `case` judges their results.
"""
