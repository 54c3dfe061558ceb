"""Backchannel: a self-hosted queue for LLM chat jobs."""

__version__ = "0.1.0"
