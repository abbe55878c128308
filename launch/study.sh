#!/usr/bin/env bash
# Trains several experiments over several seeds and compares each with the first: paired by seed, with confidence intervals.
# Runs that are done already are not trained again. Arguments go to every training, as overrides of the configuration.
#
#   ./launch/study.sh etsy                 the etsy_* experiments, each seed another simulated world
#   RAW=DIR ./launch/study.sh kuairand     shared bottom, MMoE and PLE of one size on KuaiRand-Pure, and calibration by tab
#
#   SEEDS="0 1 2 3 4"
#   ROWS=600000          etsy: impressions of a world
#   OUT=runs/study       folder of the runs; the tables are in OUT/NAME/*.md
#   NPROC=2              ranks; default: one a GPU, else 2
set -euo pipefail
. "$(dirname "$0")/env.sh"

study=${1:?"name a study, etsy or kuairand: $0 etsy"}
shift
seeds=(${SEEDS:-0 1 2 3 4})
out=${OUT:-runs/study}/$study
./launch/setup.sh
set_ranks
python=.venv/bin/python
torchrun=(.venv/bin/torchrun --standalone --nproc-per-node "$NPROC")
mkdir -p "$out"

# train_and_score ARM SEED OVERRIDES...
train_and_score() {
    local run_dir=$out/$1/$2
    if [[ -f $run_dir/predictions/test/part-00000.parquet ]]; then return; fi
    run "${torchrun[@]}" -m rec.train seed="$2" run_dir="$run_dir" "${@:3}"
    run "${torchrun[@]}" -m rec.evaluate run_dir="$run_dir" predictions=true
}

# compare ARM ARM...: the first is the reference, and names the table
compare() {
    local arguments=(--reference "${seeds[@]/#/$out/$1/}") table=$out/against_$1 arm
    for arm in "${@:2}"; do arguments+=(--candidate "${seeds[@]/#/$out/$arm/}"); done
    run "$python" -m rec.compare "${arguments[@]}" --names "$@" --markdown --json "$table.json" | tee "$table.md"
}

case $study in
etsy)
    arms=(etsy_shared_bottom etsy_mmoe etsy_mmoe_atc etsy_mmoe_favourites etsy_expert_dropout etsy_temperature)
    for seed in "${seeds[@]}"; do
        run "$python" -m rec.simulate --out "data/etsy/$seed" --rows "${ROWS:-600000}" --seed "$seed"
        for arm in "${arms[@]}"; do
            train_and_score "$arm" "$seed" experiment="$arm" data.path="data/etsy/$seed" trainer.eval_split=null "$@"
        done
    done
    compare "${arms[@]}"
    compare "${arms[@]:1}"
    ;;
kuairand)
    : "${RAW:?set RAW to the folder of the KuaiRand-Pure download: RAW=DIR $0 kuairand}"
    run "$python" -m rec.prepare kuairand --raw "$RAW" --out data/kuairand
    arms=(shared_bottom mmoe ple)
    for arm in "${arms[@]}"; do # as many dense weights as the MMoE of experiment=kuairand
        width=$("$python" -m rec.widen experiment=kuairand experts="$arm" --like experiment=kuairand experts=mmoe)
        for seed in "${seeds[@]}"; do
            train_and_score "$arm" "$seed" experiment=kuairand experts="$arm" "$width" "$@"
        done
    done
    compare "${arms[@]}"
    # Calibration needs rows that were not trained on: the last day of April, held out.
    run "$python" -m rec.prepare kuairand --raw "$RAW" --out data/kuairand-held --valid-days 1
    run "${torchrun[@]}" -m rec.train experiment=kuairand data.path=data/kuairand-held run_dir="$out/calibrated" "$@"
    run "${torchrun[@]}" -m rec.calibrate run_dir="$out/calibrated" | tee "$out/calibration.txt"
    ;;
*)
    echo "study '$study' is not known; expected etsy or kuairand: $0 etsy" >&2
    exit 2
    ;;
esac
echo
echo "[study] done in $SECONDS s; tables are in $out"
