"""What a training raises."""

from __future__ import annotations


class TrainError(ValueError):
    """A training that cannot start, go on or be resumed; the message says why and what to change."""


class DataError(ValueError):
    """Training data that cannot be used; the message says which and why."""


class ProcessError(ValueError):
    """Processes that cannot train together, or one of which was lost; the message says why and what to do."""
