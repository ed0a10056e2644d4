#!/usr/bin/env bash
# Spark-VL-7B's base model, evaluated in the same way (eval_spark_vl_7b.sh).
#
#   recipes/eval_qwen2_5_vl_7b.sh BENCHMARK.json [MORE.json ...]
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct} exec "$(dirname "$0")/eval_spark_vl_7b.sh" "$@"
