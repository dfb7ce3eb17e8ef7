"""Recorded answers of a teacher: how a record is coded, where records lie, and what a cache says of its origin."""
