"""Trace replay over the classes that production runs."""
