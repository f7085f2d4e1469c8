"""Server errors, in one line."""


class ServerError(OSError):
    """A TorchServe operation failed; the message says what, why, and where the log is."""
