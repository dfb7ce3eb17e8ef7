"""Potstill distils large language models: a teacher's knowledge goes into a student that is small enough to serve.

Importing this package imports nothing heavy. `potstill.objectives` needs torch alone; the command line is `potstill --help`.
"""

__version__ = "0.1.0"
