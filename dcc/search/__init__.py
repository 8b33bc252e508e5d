"""Caching schedules: the search over them, its front, and what is written about it."""
