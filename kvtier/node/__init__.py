"""The daemon that owns everything under VRAM on one host."""
