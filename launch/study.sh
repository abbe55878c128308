#!/usr/bin/env bash
# Trains several experiments over several seeds and compares each with the first: paired by seed, with confidence intervals.
# Runs that are done already are not trained again. Arguments go to every training, as overrides of the configuration.
#
#   ./launch/study.sh etsy                    the etsy_* experiments, each seed another simulated world; so are the next three
#   ./launch/study.sh taobao                  five routes of linear features, three ways to read histories, five layers or three
#   ./launch/study.sh apps                    factorisation machine, ESMM, AITM, ESCM2, and how scores are fused
#   ./launch/study.sh mtmd                    one model of four placements against a model each
#   RAW=DIR ./launch/study.sh kuairand        shared bottom, MMoE and PLE of one size on KuaiRand-Pure, and calibration by tab
#   RAW=DIR ./launch/study.sh kuairand_din    histories averaged or attended
#   RAW=DIR ./launch/study.sh kuairand_tabs   one model of 15 tabs against a model each
#   RAW=DIR ./launch/study.sh census          the MMoE paper's seven ways to share, on Census-Income (KDD)
#   RAW=DIR ./launch/study.sh adult           the same on its small sibling
#
#   SEEDS="0 1 2 3 4"
#   ROWS=600000          simulated studies: impressions of a world
#   OUT=runs/study       folder of the runs; the tables are in OUT/NAME/*.md
#   NPROC=2              ranks; default: one a GPU, else 2; census, adult: 1
set -euo pipefail
. "$(dirname "$0")/env.sh"

study=${1:?"name a study, e.g. etsy: $0 etsy"}
shift
seeds=(${SEEDS:-0 1 2 3 4})
out=${OUT:-runs/study}/$study
more=("$@")
./launch/setup.sh
if [[ $study == census || $study == adult ]]; then export NPROC=${NPROC:-1}; fi
set_ranks
python=.venv/bin/python
torchrun=(.venv/bin/torchrun --standalone --nproc-per-node "$NPROC")
mkdir -p "$out"

# train_and_score ARM SEED OVERRIDES...
train_and_score() {
    local run_dir=$out/$1/$2
    if [[ -f $run_dir/predictions/test/part-00000.parquet ]]; then return; fi
    run "${torchrun[@]}" -m rec.train seed="$2" run_dir="$run_dir" "${@:3}" "${more[@]}"
    run "${torchrun[@]}" -m rec.evaluate run_dir="$run_dir" predictions=true
}

# in_worlds OVERRIDES...: makes a world a seed, and in each trains every arm of the associative array `arms`, in the order of `names`
in_worlds() {
    local seed name
    for seed in "${seeds[@]}"; do
        run "$python" -m rec.simulate --out "data/worlds/$seed" --rows "${ROWS:-600000}" --seed "$seed"
        for name in "${names[@]}"; do
            # shellcheck disable=SC2086 # overrides are words
            train_and_score "$name" "$seed" ${arms[$name]} data.path="data/worlds/$seed" trainer.eval_split=null "$@"
        done
    done
}

# sides ARM ARM...: the arguments of rec.compare; with one seed the intervals are over rows, with several over seeds
sides() {
    local arm role=--reference
    for arm in "$@"; do
        if [[ ${#seeds[@]} -gt 1 ]]; then echo "$role"; fi
        printf '%s\n' "${seeds[@]/#/$out/$arm/}"
        role=--candidate
    done
}

# compare ARM ARM...: the first is the reference, and names the table
compare() {
    local arguments table=$out/against_$1
    mapfile -t arguments < <(sides "$@")
    run "$python" -m rec.compare "${arguments[@]}" --names "$@" --markdown --json "$table.json" | tee "$table.md"
}

# alone DOMAINS...: each domain's metrics by its own model, alone_DOMAIN, and by the models of all domains in the array `all`
alone() {
    local arm domain
    for arm in "${all[@]}"; do
        "$python" -m rec.report "${seeds[@]/#/$out/$arm/}" --split test --domains --markdown >"$out/report_$arm.md"
    done
    { grep -m 1 "^| task" "$out/report_${all[0]}.md" || true; } | sed "s/^| task/| model | task/"
    echo "|:--|:--|--:|--:|--:|--:|--:|--:|--:|"
    for domain in "$@"; do
        "$python" -m rec.report "${seeds[@]/#/$out/alone_$domain/}" --split test --domains --markdown >"$out/report_alone_$domain.md"
        for arm in "alone_$domain" "${all[@]}"; do
            grep -E "^\| [a-z_]+ / $domain \|" "$out/report_$arm.md" | sed "s/^/| ${arm%_"$domain"} /" || true
        done
    done
}

: "${RAW:=}"
need_raw() { if [[ -z $RAW ]]; then echo "set RAW to the folder of the download: RAW=DIR $0 $study" >&2; exit 2; fi; }
declare -A arms
names=()

case $study in
etsy)
    names=(etsy_shared_bottom etsy_mmoe etsy_mmoe_atc etsy_mmoe_favourites etsy_expert_dropout etsy_temperature)
    for name in "${names[@]}"; do arms[$name]=experiment=$name; done
    in_worlds
    compare "${names[@]}"
    compare "${names[@]:1}"
    ;;
taobao)
    names=(none v1 v2 v3 v4 v5 mean transformer five_layers three_layers)
    for name in none v1 v2 v3 v4 v5; do arms[$name]="experiment=taobao linear=$name"; done
    arms[mean]="experiment=taobao model.histories=[]"
    arms[transformer]="experiment=taobao_transformer"
    arms[five_layers]="experiment=taobao_deep"
    arms[three_layers]="experiment=taobao_slim"
    in_worlds
    compare none v1 v2 v3 v4 v5
    compare mean v4 transformer
    compare five_layers three_layers
    for name in five_layers three_layers; do # what a row takes
        run "$python" -m rec.export run_dir="$out/$name/${seeds[0]}" | tee "$out/latency_$name.txt"
    done
    ;;
apps)
    names=(no_fm apps_mmoe fm_per_task apps_esmm aitm escm2)
    for name in apps_mmoe apps_esmm aitm escm2; do arms[$name]=experiment=$name; done
    arms[no_fm]="experiment=apps_mmoe model.fm.kind=none"
    arms[fm_per_task]="experiment=apps_mmoe model.fm.kind=per_task model.fm.scale=true"
    in_worlds
    compare "${names[@]}"
    run "$python" -m rec.fuse --runs "${seeds[@]/#/$out/apps_esmm/}" --weights click=0.95 purchase=0.05 --markdown | tee "$out/fusion.md"
    ;;
mtmd)
    placements=(search_top search_bottom listing_page home)
    names=(pooled mtmd star pepnet)
    arms[pooled]="experiment=mtmd experts=mmoe model.experts.num_experts=6"
    arms[mtmd]="experiment=mtmd"
    arms[star]="experiment=mtmd experts=star"
    arms[pepnet]="experiment=mtmd experts=pepnet"
    in_worlds model.experts.layer_sizes=[128,64]
    for number in "${!placements[@]}"; do # the log has their numbers
        place=${placements[number]}
        for seed in "${seeds[@]}"; do
            run "$python" -m rec.select --data "data/worlds/$seed" --out "data/worlds/${seed}_$place" --where placement="$number"
            # trained on its own rows, evaluated on all
            if [[ ! -d $out/alone_$place/$seed ]]; then
                run "${torchrun[@]}" -m rec.train seed="$seed" run_dir="$out/alone_$place/$seed" experiment=mtmd experts=shared_bottom \
                    model.experts.layer_sizes=[128,64] data.path="data/worlds/${seed}_$place" trainer.eval_split=null \
                    "data.tasks.purchase.domains=null" "${more[@]}"
                run "${torchrun[@]}" -m rec.evaluate run_dir="$out/alone_$place/$seed" data.path="data/worlds/$seed" predictions=true
            fi
        done
    done
    compare "${names[@]}"
    all=(pooled mtmd)
    alone "${placements[@]}" | tee "$out/alone.md"
    ;;
kuairand)
    need_raw
    run "$python" -m rec.prepare kuairand --raw "$RAW" --out data/kuairand
    names=(shared_bottom mmoe ple)
    for name in "${names[@]}"; do # as many dense weights as the MMoE of experiment=kuairand
        width=$("$python" -m rec.widen experiment=kuairand experts="$name" --like experiment=kuairand experts=mmoe)
        for seed in "${seeds[@]}"; do
            train_and_score "$name" "$seed" experiment=kuairand experts="$name" "$width"
        done
    done
    compare "${names[@]}"
    # Calibration needs rows that were not trained on: the last day of April, held out.
    run "$python" -m rec.prepare kuairand --raw "$RAW" --out data/kuairand-held --valid-days 1
    run "${torchrun[@]}" -m rec.train experiment=kuairand data.path=data/kuairand-held run_dir="$out/calibrated" "${more[@]}"
    run "${torchrun[@]}" -m rec.calibrate run_dir="$out/calibrated" | tee "$out/calibration.txt"
    ;;
kuairand_din)
    need_raw
    run "$python" -m rec.prepare kuairand --raw "$RAW" --out data/kuairand
    for seed in "${seeds[@]}"; do
        train_and_score mean "$seed" experiment=kuairand
        train_and_score din "$seed" experiment=kuairand_din
    done
    compare mean din
    ;;
kuairand_tabs)
    need_raw
    run "$python" -m rec.prepare kuairand --raw "$RAW" --out data/kuairand
    for seed in "${seeds[@]}"; do
        train_and_score one_mmoe "$seed" experiment=kuairand
        train_and_score one_mtmd "$seed" experiment=kuairand_mtmd
    done
    compare one_mmoe one_mtmd
    for tab in {0..14}; do
        run "$python" -m rec.select --data data/kuairand --out "data/kuairand_tabs/$tab" --where tab="$tab"
        for seed in "${seeds[@]}"; do
            if [[ -d $out/alone_$tab/$seed ]]; then continue; fi
            run "${torchrun[@]}" -m rec.train seed="$seed" run_dir="$out/alone_$tab/$seed" experiment=kuairand \
                data.path="data/kuairand_tabs/$tab" "${more[@]}"
            run "${torchrun[@]}" -m rec.evaluate run_dir="$out/alone_$tab/$seed" data.path=data/kuairand predictions=true
        done
    done
    all=(one_mmoe one_mtmd)
    alone {0..14} | tee "$out/alone.md"
    ;;
census | adult)
    need_raw
    run "$python" -m rec.prepare "$study" --raw "$RAW" --out "data/$study"
    for pair in income education; do
        main=$pair
        if [[ $pair == education ]]; then main=education_college; fi
        names=(single_task shared_bottom l2_constrained cross_stitch omoe mmoe ple)
        arms=(
            [single_task]="experts=shared_bottom data.learn=[$main]" [shared_bottom]="experts=shared_bottom"
            [l2_constrained]="experts=separate model.experts.l2_constraint=0.001" [cross_stitch]="experts=cross_stitch"
            [omoe]="experts=omoe model.experts.num_experts=8" [mmoe]="experts=mmoe_paper"
            [ple]="experts=cgc model.experts.num_shared_experts=2 model.experts.num_task_experts=3"
        )
        groups=()
        for name in "${names[@]}"; do # as many dense weights as MMoE
            # shellcheck disable=SC2086
            width=$("$python" -m rec.widen experiment=census_$pair data="$study" ${arms[$name]} model.experts.layer_sizes=[16] --like experiment=census_$pair data="$study")
            for seed in "${seeds[@]}"; do
                # shellcheck disable=SC2086
                train_and_score "${pair}_$name" "$seed" experiment=census_$pair data="$study" ${arms[$name]} "$width"
            done
            groups+=(--group "$name" "${seeds[@]/#/$out/${pair}_$name/}")
        done
        run "$python" -m rec.report "${groups[@]}" --main "$main" --split test --markdown | tee "$out/$pair.md"
    done
    ;;
*)
    echo "study '$study' is not known; $0 names them: $(grep -oE '^[a-z_]+( \| [a-z]+)?\)' "$0" | tr -d ')' | tr '\n' ' ')" >&2
    exit 2
    ;;
esac
echo
echo "[study] done in $SECONDS s; tables are in $out"
