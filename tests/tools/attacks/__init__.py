"""Tables of attacks on the commands, and what runs and judges them; `tests/tools/hostile.py` is the program.

A module that ends in `_cases` is a table. Its rows are `Case`s: a command line, the files to damage first,
and the exit codes that are allowed.
"""
