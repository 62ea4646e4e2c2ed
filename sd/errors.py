"""The base of every error that a user's mistake raises."""


class SDError(ValueError):
    """A mistake in what was given: one sentence that names the thing, its value and what is allowed.

    The command line shows it without a traceback; anything else that is raised is a fault of the program.
    """
