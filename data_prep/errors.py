"""The one error a person may cause: printed as a single line, without a traceback."""


class UserError(Exception):
    """A mistake in what the user gave: its message names the cause, the place and the remedy.

    The command line prints the message and exits with `code`: 2 for wrong use (a bad recipe or option), 1 for work that
    failed (a corrupt file, a full disk).
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code
