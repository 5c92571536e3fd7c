#!/usr/bin/env bash
# Context recovery of SmolLM2-135M on GSM8K, for one 80 GB GPU: the model and both baselines, fine-tuned for as many
# steps, at N = 64 and 128, with a teacher and without, then stage 1. What tells most comes first.
#
#     bash benchmarks/recovery_gpu.sh                        from the Hub
#     BASE=FILE.gguf DATA=gsm8k_train.jsonl OUT=outputs/recovery STEPS=1200 bash benchmarks/recovery_gpu.sh
#     TINY=1 bash benchmarks/recovery_gpu.sh                 a random model, minutes on a CPU: does it run?
#
# Every part prints its table as it ends. The same command again leaves out the parts that are done, and goes on with
# the one that was cut off. All tables, and recovery.md and recovery.png of them, are in OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/recovery}
BASE=${BASE:-HuggingFaceTB/SmolLM2-135M-Instruct} DATA=${DATA:-openai/gsm8k}
STEPS=${STEPS:-1200}  # of 32 records; after 300 Δ had learned nothing yet (docs/experiments.md, section 6)
SIZES=(64 128)
EVALUATION=(--generated_records 64 --batch_size 32 --dtype bfloat16)
FLAGS=(recipes/smollm2_gsm8k.yaml --per_device_train_batch_size 32 --gradient_accumulation_steps 1)
FLAGS+=(--max_validation_records 300 --logging_steps 20)
FLAGS+=(--learning_rate 1e-3 --alpha_learning_rate 3e-2 --llm_learning_rate 2e-4)
FLAGS+=(--hypernet_slot_gate true --adam_beta2 0.95)  # without, a prototype learned no facts (section 4)

if [ -n "${TINY:-}" ]; then
    OUT=${OUT}_tiny STEPS=2 DATA=python-docstrings SIZES=(8)
    EVALUATION=(--generated_records 2 --max_new_tokens 8 --max_records 4 --bootstrap_samples 20)
    FLAGS=(recipes/docstrings.yaml --per_device_train_batch_size 2 --max_validation_records 4 --hypernet_hidden_size 16 --chunk_length 4 --use_cpu)
    BASE=$OUT/base
fi

part() { printf '\n== %s, %d s\n' "$1" "$SECONDS"; }
train() {  # NAME FLAGS…
    local name=$1
    shift
    part "training $name"
    [ -f "$OUT/$name/results.json" ] && echo "done before" && return
    python train_sft.py "${FLAGS[@]}" --model_name_or_path "$BASE" --dataset_name "$DATA" --max_steps "$STEPS" \
        --output_dir "$OUT/$name" --disable_tqdm true "$@"
}
compare() {  # MODEL BASELINES…
    local name=$1
    shift
    part "comparing $name"
    [ -f "$OUT/$name/evaluation.json" ] && echo "done before" && return
    local baselines=()
    [ $# -eq 0 ] || baselines=(--baselines "${@/#/$OUT/}")
    python -m scripts.eval_sft --model_dir "$OUT/$name" --dataset "$DATA" "${baselines[@]}" "${EVALUATION[@]}"
    python -m benchmarks.recovery "$OUT"
}

if [ -n "${TINY:-}" ] && [ ! -f "$BASE/results.json" ]; then
    python train_sft.py "${FLAGS[@]}" --baseline full_context --max_steps 1 --output_dir "$BASE" --disable_tqdm true
fi
train full_context --baseline full_context
for N in "${SIZES[@]}"; do
    train "window_distilled_$N" --baseline window --num_soft_tokens "$N" --distill "$OUT/full_context"
    train "joint_distilled_$N" --num_soft_tokens "$N" --distill "$OUT/full_context"
    compare "joint_distilled_$N" "window_distilled_$N" full_context
done
for N in "${SIZES[@]}"; do
    train "window_$N" --baseline window --num_soft_tokens "$N"
    train "joint_$N" --num_soft_tokens "$N"
    compare "joint_$N" "window_$N" full_context
    train "stage1_$N" --stage hypernet --num_soft_tokens "$N"
    compare "stage1_$N"
done
part "the end"
python -m benchmarks.recovery "$OUT"
