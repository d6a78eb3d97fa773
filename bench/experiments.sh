#!/bin/bash
# Queues the experiments of docs/experiments.md; `dvc queue start --jobs 2` then runs them, each on one core. In a clone
# of its own, with OMP_NUM_THREADS=1 and ENCORE_SCRATCH=$PWD/.encore set:
#
#     bash bench/experiments.sh english     # both recipes on english/*.parquet, a folder that you bring
#     bash bench/experiments.sh sympy       # both recipes on sympy's sources, in bfloat16
#     bash bench/experiments.sh sizes       # nanochat from 2 layers of 64 to 8 of 256, on sympy's sources
set -euo pipefail
corpus=${1:?english, sympy or sizes}

# NAME KEY=VALUE ...: what all have in common. A run ends with the loss over all windows of the val split.
queue() {
    local name=$1 values=() value
    for value in n_layer=4 n_embd=128 block_size=256 token_cap=8_000_000 eval_interval=10000 eval_iters=80 log_interval=5 \
        checkpoint_interval=400 "${data[@]}" "${@:2}"; do values+=(-S "$value"); done
    dvc exp run --queue --name "$corpus-$name" "${values[@]}" train
}

# STEPS RATE SEED
gpt2() {
    queue "gpt2-$1-$2-$3" max_iters="$1" learning_rate="$2" seed="$3" min_lr="$(python -c "print($2 / 10)")" \
        warmup_iters=$(($1 / 10)) architecture=gpt2 n_head=4 optimizer=adamw embedding_lr=null head_lr=null \
        lr_schedule=cosine warmdown_ratio=null weight_decay=0.1 beta1=0.9
}

# ARCHITECTURE STEPS RATE SEED: that rate for matrices and head, without weight decay.
modern() {
    queue "$1-$2-$4" architecture="$1" max_iters="$2" learning_rate="$3" head_lr="$3" seed="$4" n_head=1 \
        embedding_lr=0.3 weight_decay=0.0
}

# STEPS SEED: nanochat-plus at the rates of docs/learning-rates.md.
auto() {
    queue "auto-$1-$2" architecture=nanochat-plus max_iters="$1" learning_rate=auto embedding_lr=auto head_lr=auto \
        weight_decay=auto seed="$2" n_head=1
}

# LAYERS WIDTH FACTOR HEAD_RATE: the rates of the matrices and of embeddings times the factor.
size() {
    local matrices embedding
    read -r matrices embedding < <(python -c "print(0.02 * $3, 0.3 * $3)")
    queue "$1x$2-$3-$4" n_layer="$1" n_embd="$2" n_head=1 max_iters=100 learning_rate="$matrices" \
        embedding_lr="$embedding" head_lr="$4" weight_decay=0.0
}

case $corpus in
english)
    # An experiment runs in a copy of what git tracks, so the path must not depend on where that is.
    files="files:$PWD/english/*.parquet"
    data=("dataset=$files" "dataset_revision=$(encore sources "$files")" val_fraction=0.03)
    best_400=2e-3 best_1600=8e-3
    ;;
sympy) data=(dtype=bfloat16) best_400=4e-3 best_1600=4e-3 ;;
sizes) data=(dtype=bfloat16) ;;
*) echo "english, sympy or sizes, not $corpus" >&2 && exit 2 ;;
esac

if [ "$corpus" = sizes ]; then
    # The head's rate times the width is 2.56; or it is that of 4 layers of 128.
    for factor in 0.5 1 2; do
        size 2 64 $factor "$(python -c "print(0.04 * $factor)")"
        size 4 128 $factor "$(python -c "print(0.02 * $factor)")"
        size 6 192 $factor "$(python -c "print(round(2.56 / 192, 4) * $factor)")"
    done
    size 2 64 1 0.02
    size 6 192 1 0.02
    size 3 96 1 0.0267
    size 8 256 1 0.01
    exit
fi
for rate in 1e-3 2e-3 4e-3 8e-3; do gpt2 400 $rate 1337; done
for rate in 2e-3 4e-3 8e-3 1.6e-2; do gpt2 1600 $rate 1337; done
for seed in 1 2; do gpt2 400 $best_400 $seed && gpt2 1600 $best_1600 $seed; done
for seed in 1337 1 2; do
    auto 50 $seed && auto 200 $seed
    modern nanochat-plus 50 0.03 $seed
    modern nanochat-plus 300 0.02 $seed
    for architecture in nanochat nanochat-plus; do modern $architecture 100 0.03 $seed; done
done
modern nanochat 400 0.02 1337
