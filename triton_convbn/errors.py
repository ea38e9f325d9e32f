"""What the command line tells its user in one line."""


class UsageError(Exception):
    """Something that the user can put right; the message says how. Exit code 2."""
