"""The `d2i` command: reads arguments, calls one part of d2i, prints. Heavy imports stay inside."""

from d2i.cli.app import main

__all__ = ["main"]
