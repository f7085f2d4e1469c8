"""What is wrong with a configuration."""

from collections.abc import Callable

import pytest

from llama_tp.config_error import ConfigError


def problems_of(make: Callable[..., object], /, *args: object, **kwargs: object) -> list[str]:
    """The problems that `make` refuses its arguments for, of which each is a line of the message."""
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems
