"""What a training raises."""

from __future__ import annotations

from sd.errors import SDError


class TrainError(SDError):
    """A training that cannot start, go on or be resumed; the message says why and what to change."""


class DataError(SDError):
    """Training data that cannot be used; the message says which and why."""


class ProcessError(SDError):
    """Processes that cannot train together, or one of which was lost; the message says why and what to do."""
