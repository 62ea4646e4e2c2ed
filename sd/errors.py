"""The base class of errors caused by bad input, and the error for results that are not finite."""


class SDError(ValueError):
    """Bad input: one sentence that names the thing, its value and what is allowed.

    The command line prints it without a traceback; any other ValueError is a bug.
    """


class NotFiniteError(RuntimeError):
    """A picture came out as NaN; the message says whether the weights or an overflow are to blame."""
