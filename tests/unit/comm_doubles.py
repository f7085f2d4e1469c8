"""A group of ranks without a second rank: what the leader publishes is kept, and played to followers."""

from llama_tp.parallel.comm import SingleComm


class RecordingComm(SingleComm):
    """The leader of two, as far as the engine can tell: keeps what it publishes."""

    size = 2

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def publish(self, message: bytes | None) -> bytes:
        assert message is not None
        self.messages.append(message)
        return message


class ReplayingComm(SingleComm):
    """A follower that hears a record."""

    size = 2
    is_leader = False

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = iter(messages)

    def publish(self, message: bytes | None) -> bytes:
        assert message is None
        return next(self._messages)
