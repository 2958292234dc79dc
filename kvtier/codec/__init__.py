"""Frames: blocks as they lie below the host tier, encoded, checked and marked."""
