"""The one exception that speaks to the user."""


class UserError(Exception):
    """What the user can mend: one line that names the file, row or key and what was expected.

    Exit 2.
    """
