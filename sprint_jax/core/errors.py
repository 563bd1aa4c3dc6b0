"""The one exception for mistakes that a user can make and mend."""


class UserError(ValueError):
    """A mistake in a flag, key, path, file or value; the message is one line that says what to do.

    Attributes:
      exit_code: what a command exits with: 2 for usage (a wrong flag or key), 1 for any other failure.
      abrupt: whether a command ends at once, without waiting for threads that cannot finish.
    """

    def __init__(self, message: str, exit_code: int = 1, abrupt: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.abrupt = abrupt
