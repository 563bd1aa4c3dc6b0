"""The one exception for mistakes that a user can make and mend, and how memory says that it is not enough."""

OUT_OF_MEMORY = 4  # exit code
EXHAUSTED = "RESOURCE_EXHAUSTED"  # how XLA says that memory is not enough


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device's or the host's memory is not enough."""
    of_jax = any(kind.__name__ == "JaxRuntimeError" for kind in type(error).__mro__)
    return isinstance(error, MemoryError) or (of_jax and EXHAUSTED in str(error))


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
