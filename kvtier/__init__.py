"""kvtier: a distributed prompt-cache tier for LLM serving."""

__version__ = "0.1.0"
