"""A model that some server has, as the load needs it."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_tp.bench.api import Api
from llama_tp.bench.client import Target

_TIMEOUT_S = 30.0
_MAX_BODY = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Where a model is, how to ask it, and how much it takes."""

    target: Target
    apis: Sequence[Api]
    max_seq_len: int
    """The longest sequence that is accepted."""
    description: str
    """One line for the user."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the closing JSON."""


def get_json(target: Target, route: str, *, remedy: str) -> Any:
    """What the server answers to a GET. OSError, in one line, if that is not JSON.

    Args:
        target: whose path comes before the route
        route: below that
        remedy: for the user, unless the API key is missing or wrong
    """
    url = target.url + route
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as the load: directly
    try:
        with opener.open(urllib.request.Request(url, headers=dict(target.headers)), timeout=_TIMEOUT_S) as answer:
            return json.loads(answer.read(_MAX_BODY))
    except urllib.error.HTTPError as error:
        remedy = "give its key by --api_key_file" if error.code in (401, 403) else remedy
        raise OSError(f"{url} answered {error.code}; {remedy}") from None
    except urllib.error.URLError as error:
        raise OSError(f"no server answers at {url}: {error.reason}; {remedy}") from None
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"the answer of {url} cannot be read: {error!r}; {remedy}") from None
    except ValueError:
        raise OSError(f"{url} answered something that is not JSON; {remedy}") from None
