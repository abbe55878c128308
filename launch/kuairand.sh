#!/usr/bin/env bash
# Three seeds on KuaiRand-Pure beside LightGBM on the same columns: prepares the data, trains on 04-25..04-30, evaluates on
# 05-01.. and prints one table. About ten minutes on two cores. Arguments are overrides of the configuration.
#
#   RAW=/path/to/KuaiRand-Pure ./launch/kuairand.sh
#   RAW=/path/to/KuaiRand-Pure ./launch/kuairand.sh experts=shared_bottom
#
#   RAW          folder of the official download (kuairand.com), the one that holds data/
#   SEEDS="0 1 2"
#   OUT=runs/kuairand
#   NPROC=2      ranks; default: one a GPU, else 2
set -euo pipefail
. "$(dirname "$0")/env.sh"

: "${RAW:?set RAW to the folder of the KuaiRand-Pure download: RAW=DIR $0}"
out=${OUT:-runs/kuairand}
./launch/setup.sh
set_ranks
python=.venv/bin/python
torchrun=(.venv/bin/torchrun --standalone --nproc-per-node "$NPROC")

run "$python" -m rec.prepare kuairand --raw "$RAW" --out data/kuairand
report=()
for seed in ${SEEDS:-0 1 2}; do
    run "${torchrun[@]}" -m rec.train experiment=kuairand seed="$seed" run_dir="$out/$seed" "$@"
    run "${torchrun[@]}" -m rec.evaluate run_dir="$out/$seed"
    report+=("$out/$seed")
done
for seed in ${SEEDS:-0 1 2}; do
    run "$python" -m rec.baseline --data conf/data/kuairand.yaml --path data/kuairand --seed "$seed" --json "$out/lightgbm-$seed.json"
    report+=(--baseline "$out/lightgbm-$seed.json")
done
run "$python" -m rec.report "${report[@]}" --markdown
