#!/usr/bin/env bash
# Trains on this node together with others: run it once a node, with the same arguments, which are overrides of the
# configuration. slurm.sbatch and kubernetes.yaml do so; by hand, on each of two nodes:
#
#   NNODES=2 NODE_RANK=0 MASTER=node-a:29500 JOB_ID=7 ./launch/node.sh experiment=quickstart run_dir=/shared/runs/7
#
#   NNODES          nodes in all
#   MASTER          host:port where the nodes meet; the host is node 0
#   JOB_ID          any word that all nodes of this job share and no other job uses
#   NODE_RANK       0 to NNODES - 1; default: Slurm's or Kubernetes' number, else torchrun finds out whether it is MASTER
#   NPROC           ranks on this node; default: one a GPU, else 2
#   MAX_RESTARTS    times that torchrun starts all ranks again after one died; default 0
#
# It installs nothing, since nodes often share one folder: run ./launch/setup.sh once beforehand, or use an image that
# has torchrun and rec. run_dir must be a folder that every node sees.
set -euo pipefail
. "$(dirname "$0")/env.sh"

complain() {
    echo "node.sh: $*" >&2
    problems=$((problems + 1))
}

# require NAME PATTERN MEANING: counts a problem unless the variable is set and matches.
require() {
    local value=${!1:-}
    if [[ -z "$value" ]]; then
        complain "$1 is not set, expected $3"
    elif [[ ! "$value" =~ $2 ]]; then
        complain "$1 is '$value', expected $3"
    fi
}

problems=0
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-}}}
PATH="$PWD/.venv/bin:$PATH"
require NNODES '^[1-9][0-9]*$' "the number of nodes, such as 2"
require MASTER '^.+:[0-9]+$' "host:port of node 0, such as node-a:29500"
require JOB_ID '.' "a word that all nodes of this job share, such as its number"
if [[ -n "$NODE_RANK" ]]; then require NODE_RANK '^[0-9]+$' "this node's number, 0 to NNODES - 1"; fi
command -v torchrun >/dev/null || complain "torchrun is neither in .venv nor on PATH: run ./launch/setup.sh once first"
if [[ $problems -gt 0 ]]; then
    echo "node.sh: $problems problem(s); ./launch/node.sh --help shows an example" >&2
    exit 2
fi
set_ranks

rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "$JOB_ID")
if [[ -n "$NODE_RANK" ]]; then # else torchrun compares MASTER with this node's names, which fails behind some DNS
    rendezvous+=(--rdzv-conf "is_host=$([[ $NODE_RANK -eq 0 ]] && echo true || echo false)")
fi
echo "node.sh: node ${NODE_RANK:-?} of $NNODES, $NPROC ranks, meeting at $MASTER"
# exec: a SIGTERM to this script reaches torchrun, which hands it to the ranks, which write a checkpoint.
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "${MAX_RESTARTS:-0}" "${rendezvous[@]}" \
    -m rec.train "$@"
