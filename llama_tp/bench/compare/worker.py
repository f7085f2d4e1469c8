"""A contender's process: one JSON object a line on stdin, one back on stdout for each.

`load` comes first: {"do": "load", "engine": ..., "work": {...}}; then any number of {"do": "run", "prompts": [[...]],
"new": ...}. The answer to what failed is {"error": ...}. What libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from llama_tp.bench.compare.engines import Work, load
from llama_tp.bench.contenders import Contender
from llama_tp.parallel.agreement import one_line
from llama_tp.parallel.launch import die_with_parent


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender: Contender | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                contender, version = load(request["engine"], Work(**request["work"]))
                answer: Mapping[str, Any] = {"version": version}
            else:
                assert contender is not None, "nothing is loaded"
                answer = asdict(contender.run(request["prompts"], request["new"]))
        except Exception as error:  # of a peer: anything
            answer = {"error": one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
