"""Fixtures that several files here share."""

from large_files import fed, small_thresholds
from planted import prepared, raw, settings

__all__ = ["fed", "prepared", "raw", "settings", "small_thresholds"]
