"""The one exception for mistakes the user can fix; every command line turns it into exit code 2."""


class UserError(Exception):
    """Bad input. The message is one sentence naming the file, row or key and what to do about it."""

    exit_code = 2


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what is kept."""
