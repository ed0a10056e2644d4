#!/usr/bin/env bash
# Spark-VL-7B over benchmark files: serve it with vLLM, evaluate, print the tables, stop the server.
#
#   recipes/eval_spark_vl_7b.sh BENCHMARK.json [MORE.json ...]
#
# Settings come from the environment:
#   MODEL   a hub name or a folder             (internlm/Spark-VL-7B)
#   MODES   what to evaluate                   ("tts answer")
#   OUTPUT  folder of the results              (results/<model's name>)
#   PORT    of the server                      (8000)
#   SERVE   more flags for vllm serve, besides (--max-model-len 24576: the largest image has 16,384 tokens)
#   EVAL    more flags for evaluate.py, besides (greedy, 2048 tokens, repetition penalty 1.05; its judge
#           sees the boxed answer, and anything but Yes leads to a reflection: the release's setting)
#   PYTHON  the interpreter                    (python)
#   VLLM    what starts a server               (vllm serve)
#
# A 7B model needs one GPU with 24 GB or more (SERVE="--tensor-parallel-size 4" for four). Run again, it evaluates only
# what is missing or failed.
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: $0 BENCHMARK.json [MORE.json ...]" >&2; exit 2; }
MODEL=${MODEL:-internlm/Spark-VL-7B}
MODES=${MODES:-tts answer}
OUTPUT=${OUTPUT:-results/$(basename "$MODEL")}
PORT=${PORT:-8000}
SERVE="--max-model-len 24576 ${SERVE:-}"  # of a flag given twice the last one counts
EVAL="--temperature 0 --max_tokens 2048 --repetition_penalty 1.05 --judge_source answer --reflect_on not_yes ${EVAL:-}"
PYTHON=${PYTHON:-python}
VLLM=${VLLM:-vllm serve}
root=$(cd "$(dirname "$0")/.." && pwd)
benchmarks=("$@")

evaluate() {  # MODE [FLAG ...]
    # shellcheck disable=SC2086  # EVAL is a list of flags
    "$PYTHON" "$root/evaluate.py" --model "$MODEL" --engine server --server "http://127.0.0.1:$PORT" \
        --mode "$1" --benchmark "${benchmarks[@]}" --output "$OUTPUT/$1.json" $EVAL "${@:2}"
}

for mode in $MODES; do  # a bad file is refused now, and not when the server is up
    evaluate "$mode" --check >/dev/null
done
mkdir -p "$OUTPUT"

# In its own process group, so that the server ends with all its workers, also on Ctrl-C.
set -m
# shellcheck disable=SC2086  # SERVE is a list of flags
$VLLM "$MODEL" --port "$PORT" $SERVE >"$OUTPUT/server.log" 2>&1 &
server=$!
set +m
stop() {
    trap '' INT TERM
    kill -TERM -- "-$server" 2>/dev/null || return 0
    for _ in {1..60}; do
        kill -0 -- "-$server" 2>/dev/null || return 0
        sleep 0.5
    done
    kill -KILL -- "-$server" 2>/dev/null || true
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

echo "waiting for vllm serve $MODEL (log: $OUTPUT/server.log)"
until "$PYTHON" - "$PORT" <<'PY'
import sys, time, urllib.request
for _ in range(30):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=2)
        sys.exit(0)
    except OSError:
        time.sleep(0.5)
sys.exit(1)
PY
do
    kill -0 "$server" 2>/dev/null || { tail -n 5 "$OUTPUT/server.log" >&2; echo "$0: vllm serve ended, see $OUTPUT/server.log" >&2; exit 1; }
done

status=0
for mode in $MODES; do
    evaluate "$mode" || status=$?
    [ "$status" -le 1 ] || exit "$status"
    "$PYTHON" "$root/calculate_acc.py" --result_path "$OUTPUT/$mode.json"
done
exit "$status"
