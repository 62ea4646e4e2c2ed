"""Exceptions of training."""

from __future__ import annotations

from sd.errors import SDError


class TrainError(SDError):
    """A training cannot start, continue or resume; the message says why and what to change."""


class DataError(SDError):
    """Training data cannot be used; the message says which and why."""


class ProcessError(SDError):
    """Processes cannot train together, or one was lost; the message says why and what to do."""
