"""The one exception that a command shows as a single line."""


class UserError(Exception):
    """Bad input, told in one line that names what was wrong, what was expected and what came. The command exits with status 2."""
