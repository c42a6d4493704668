"""The rows of a prefix cache."""

from cached_rows import cached, plain, varied_rows

__all__ = ["cached", "plain", "varied_rows"]
