"""Asks a teacher once for everything that a run needs, and records the answers."""
