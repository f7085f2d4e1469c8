"""What goes wrong with a server, in one line."""


class ServerError(OSError):
    """TorchServe did not do what it was asked; the message says what, why, and where its log is."""
