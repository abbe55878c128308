#!/usr/bin/env bash
# From nothing to a trained and evaluated ranker: sets up .venv, simulates a marketplace's log, trains on 2 ranks (or
# one a GPU), calibrates, exports, evaluates, says where to look. Run again it goes on where it stopped. Arguments are
# overrides of the configuration.
#
#   ./launch/quickstart.sh
#   ./launch/quickstart.sh run_dir=runs/short trainer.max_steps=100
#
#   ROWS=1500000   impressions to simulate; remove data/market to change it
#   NPROC=2        ranks; default: one a GPU, else 2
set -euo pipefail
. "$(dirname "$0")/env.sh"

./launch/setup.sh
set_ranks
run_dir=runs/quickstart
for argument in "$@"; do
    case "$argument" in run_dir=*) run_dir=${argument#run_dir=} ;; esac
done
torchrun=(.venv/bin/torchrun --standalone --nproc-per-node "$NPROC")

# Returns at once if the same log is there already.
run .venv/bin/python -m rec.simulate --out data/market --rows "${ROWS:-1500000}" --seed 0
run "${torchrun[@]}" -m rec.train experiment=quickstart run_dir=runs/quickstart checkpoint.resume=auto "$@"
run "${torchrun[@]}" -m rec.calibrate run_dir="$run_dir"
run .venv/bin/python -m rec.export run_dir="$run_dir"
run "${torchrun[@]}" -m rec.evaluate run_dir="$run_dir" predictions=true

cat <<END

[quickstart] done in $SECONDS s. Where to look:
  $run_dir                  configuration, checkpoints with their calibrators, logs
  $run_dir/metrics.jsonl    one JSON object a line: losses, rows a second, every metric by task and domain
  $run_dir/export           model.pt2, what a server loads with torch alone, and the schema of its inputs
  $run_dir/predictions      every test row's probabilities, which rec.compare pairs with another run's
  .venv/bin/tensorboard --logdir runs
END
