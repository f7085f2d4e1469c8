#!/usr/bin/env bash
# Send a running server (`llama-tp serve`) a plain and a streamed request. Usage: request.sh [URL]
set -euo pipefail
url=${1:-http://localhost:8080/predictions/llama}
curl -sS --fail-with-body "$url" -H 'Content-Type: application/json' \
    -d '{"dialog": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
curl -sSN --fail-with-body "$url" -H 'Content-Type: application/json' \
    -d '{"prompt": "1, 2, 3,", "max_new_tokens": 8, "temperature": 0, "stream": true}'
