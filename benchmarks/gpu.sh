#!/usr/bin/env bash
# All that one GPU is to measure at TinyLlama's shape, random weights: decoding, training, loading, the CUDA graphs
# against the library's loop, reading into a state, the server, and one long answer. What tells most comes first. 25 minutes at most.
#
#     bash benchmarks/gpu.sh                       one card of 80 GB
#     OUT=outputs/gpu LIMIT=1500 bash benchmarks/gpu.sh
#     TINY=1 bash benchmarks/gpu.sh                a random tiny model, minutes on a CPU: does it run?
#
# It needs this repository, torch 2.11 and transformers 5.17, or newer ones of both. Every part prints its table as it
# ends and leaves NAME.log and, but for the tests, NAME.json in OUT. The same command again leaves out the parts that are
# done. A part that fails, or for which no time is left, is named at the end, and the exit status is 1. A part whose
# packages are not installed is named and left out: the tests need pytest, the server those of requirements-extra.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/gpu}
LIMIT=${LIMIT:-1500}  # seconds for all parts together
FLAGS=(--shape tinyllama --compile)
DECODE=(--batch_sizes 1 64 --chunk_lengths 64 --rounds 3) TRAIN=(--batch_sizes 1 8 32 --rounds 2 --gradient_checkpointing)
LOAD=(--rounds 10) STATE=(--rounds 3 --max_prefill 65536) SERVE=(--clients 1 16 64) LONG=(--new_tokens 8192)
if [ -n "${TINY:-}" ]; then
    OUT=${OUT}_tiny FLAGS=(--shape tiny --compile)
    DECODE=(--batch_sizes 1 2 --chunk_lengths 32 --rounds 1 --new_tokens 48)
    TRAIN=(--batch_sizes 1 2 --rounds 1 --prompt_length 40 --new_tokens 40 --gradient_checkpointing)
    LOAD=(--rounds 3) STATE=(--rounds 1 --lengths 40 200) SERVE=(--clients 1 2 --requests 1 --turns 2 --rivals) LONG=(--new_tokens 256)
elif ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no GPU; TINY=1 runs on a CPU"
    exit 1
fi
mkdir -p "$OUT"
failed=()

# Runs a command with the time that is left; its output goes to the screen and to OUT/NAME.log.
part() {  # NAME COMMAND…
    local name=$1 left=$((LIMIT - SECONDS))
    shift
    printf '\n== %s, %d s\n' "$name" "$SECONDS"
    [ -f "$OUT/$name.done" ] && echo "done before" && return
    if [ "$left" -lt 20 ]; then
        failed+=("$name (no time left)")
    elif timeout -k 10 "$left" "$@" 2>&1 | tee "$OUT/$name.log" | grep -v '^{"benchmark"'; [ "${PIPESTATUS[0]}" -eq 0 ]; then
        touch "$OUT/$name.done"
    else
        failed+=("$name")
    fi
}
benchmark() {  # NAME KIND FLAGS…
    local name=$1 kind=$2
    shift 2
    part "$name" python -m benchmarks "$kind" "${FLAGS[@]}" "$@"
    grep -s '^{"benchmark"' "$OUT/$name.log" > "$OUT/$name.json" || rm -f "$OUT/$name.json" "$OUT/$name.done"
}
has() { python -c "import $1" 2> /dev/null || { printf '\n== %s: not measured, it needs %s\n' "$2" "$1"; false; }; }

benchmark decode decode "${DECODE[@]}"
benchmark train_full train --stage full "${TRAIN[@]}"
benchmark train_hypernet train --stage hypernet "${TRAIN[@]}"
has "pytest, accelerate" "the CUDA graphs" && part cuda_graphs python -m pytest -q -rs tests/model/test_decoding.py -k cuda
benchmark load load "${LOAD[@]}"
benchmark state state "${STATE[@]}"
has "fastapi, uvicorn, openai, prometheus_client" serve && benchmark serve serve "${SERVE[@]}"
benchmark long long "${LONG[@]}" --picture "$OUT/long.png"

printf '\n== the end, %d s\n' "$SECONDS"
[ ${#failed[@]} -eq 0 ] || { printf 'failed: %s\n' "${failed[@]}"; exit 1; }
