#!/bin/sh
# What to run on a machine with one GPU, in two or three calls of less than ten minutes each; no network is needed.
#
#   sh results/gpu.sh check OUT               tests marked gpu; speed, memory and traces of the four scripts (bench.py)
#   sh results/gpu.sh train OUT STEPS KEYS    the four scripts side by side, then k-NN, probes and attention maps
#
# STEPS is for all four: images/s that `check` found, / 4, x 60 x minutes / 256, less a tenth. KEYS name the data set, such as
# --dataset=folder --data_dir=data/cifar10-jpeg. OUT receives logs, tables and pictures in few files: run.tgz, and each backbone, float16.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} what=$1 out=$2
shift 2
mkdir -p "$out"
case $what in
check)
    "$python" -c 'import xdist' 2>/dev/null && many="-n 4" || many=
    timeout 240 "$python" -m pytest -m gpu --durations=10 $many > "$out/tests.txt" 2>&1 || echo "tests failed: $out/tests.txt"
    tail -n 20 "$out/tests.txt"
    timeout 330 "$python" bench.py --trace=True --out_dir="$out" | tee "$out/bench.txt"
    ;;
train)
    steps=$1
    shift
    scripts="dino barlow hybrid_a hybrid_b"
    shared="--max_steps=$steps --compile=True --base_lr=1e-3 --warmup_epochs=2 --log_every=50 --eval_every=500"
    teacher="--tau_t=0.04 --tau_t_warmup_epochs=0 --ema=0.99"
    for script in $scripts; do
        keys="$shared $([ $script = barlow ] || echo "$teacher")"
        # a run that is late is told to save, so that there is something to evaluate
        timeout -s TERM -k 20 "${SECONDS_OF_TRAINING:-450}" "$python" $script.py $keys "$@" --out_dir="$out/$script" > "$out/$script.txt" 2>&1 &
    done
    wait
    for script in $scripts; do
        "$python" eval_linear.py --ckpt="$out/$script/ckpt.pt" >> "$out/$script.txt" 2>&1 &
    done
    wait
    "$python" attn_viz.py --ckpt="$(for script in $scripts; do printf ',%s' "$out/$script/ckpt.pt"; done | cut -c2-)" --out_dir="$out" \
        > "$out/attention.txt" 2>&1 || tail -n 1 "$out/attention.txt"
    (cd "$out" && "$python" "$OLDPWD/results/table.py" $scripts) | tee "$out/table.txt"
    for script in $scripts; do
        [ -e "$out/$script/export" ] && "$python" -c '
import sys
from safetensors.torch import load_file, save_file
save_file({k: v.half() for k, v in load_file(sys.argv[1]).items()}, sys.argv[2])' \
            "$out/$script/export/model.safetensors" "$out/$script.safetensors"
    done
    tar --ignore-failed-read -czf "$out/run.tgz" -C "$out" --exclude=ckpt.pt --exclude=model.safetensors $scripts attention.png divergence.png attention.json \
        attention.txt table.txt $(for script in $scripts; do echo $script.txt; done)
    ;;
*)
    echo "error: $what is neither check nor train" >&2
    exit 2
    ;;
esac
