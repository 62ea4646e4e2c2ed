"""The base of every error that a user's mistake raises, and the one of numbers that are not finite."""


class SDError(ValueError):
    """A mistake in what was given: one sentence that names the thing, its value and what is allowed.

    The command line shows it without a traceback; anything else that is raised is a fault of the program.
    """


class NotFiniteError(RuntimeError):
    """A picture of NaN: the message says whether weights or an overflow are to blame."""
