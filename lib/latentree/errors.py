"""The one exception for bad input."""


class UserError(ValueError):
    """Bad input, told in one line that names the thing, its value and how to mend it."""
