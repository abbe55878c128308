#!/usr/bin/env bash
# Trains on this node together with others: run it once a node, with the same arguments, which are overrides of the
# configuration. slurm.sbatch and kubernetes.yaml do so; by hand, on each of two nodes:
#
#   NNODES=2 NODE_RANK=0 MASTER=node-a:29500 JOB_ID=7 ./launch/node.sh experiment=quickstart run_dir=/shared/runs/7
#
#   NNODES          nodes in all, such as 2, or a range such as 1:4, with which the job goes on without nodes that are
#                   lost, down to the first number, and takes in nodes that come, up to the second
#   MASTER          host:port where the nodes meet; the host is node 0
#   JOB_ID          any word that all nodes of this job share and no other job uses
#   NODE_RANK       0 to NNODES - 1; default: Slurm's or Kubernetes' number, else torchrun looks whether it is MASTER
#   NPROC           ranks on this node; default: one a GPU, else 2
#   MAX_RESTARTS    times that torchrun starts this node's ranks again after one died anywhere; default 0, and 10 with a
#                   range, where each node lost costs one; the same on all nodes
#   LOCAL_ADDR      address by which the others reach this node; default: its full host name
#   RDZV_CONF       more for torchrun's --rdzv-conf, such as join_timeout=1200,last_call_timeout=10 (seconds)
#
# SIGTERM at any node: all ranks write a checkpoint, for which they have 150 s (TORCH_ELASTIC_SHUTDOWN_TIMEOUT), and the
# nodes end with 75; the same commands go on. With restarts left only the node that was told to stop ends: the others wait
# up to join_timeout (600 s) for it to come back, or with a range go on without it.
#
# A node that dies: the others' ranks fail, at once, or after trainer.timeout_s where the network is silent. Without
# restarts every node.sh ends with 1, and the same commands go on from the last checkpoint. With restarts torchrun waits
# until the dead node's heartbeat is 15 s old, then until it is back or, with a range, for last_call_timeout, 30 s. But
# where the nodes meet is kept by MASTER's torchrun: if that node is lost, all end with 1 and are to be started again.
# torchrun compares heartbeats with each node's clock: they must agree to a few seconds.
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
require NNODES '^[1-9][0-9]*(:[1-9][0-9]*)?$' "the number of nodes, such as 2, or a range, such as 1:4"
if [[ "${NNODES:-}" =~ ^([0-9]+):([0-9]+)$ && ${BASH_REMATCH[1]} -gt ${BASH_REMATCH[2]} ]]; then
    complain "NNODES is '$NNODES', expected the smaller number first: ${BASH_REMATCH[2]}:${BASH_REMATCH[1]}"
fi
require MASTER '^.+:[0-9]+$' "host:port of node 0, such as node-a:29500"
require JOB_ID '.' "a word that all nodes of this job share, such as its number"
if [[ -n "${MAX_RESTARTS:-}" ]]; then require MAX_RESTARTS '^[0-9]+$' "a number, 0 or more"; fi
if [[ -n "${RDZV_CONF:-}" ]]; then require RDZV_CONF '^[a-z_]+=[^,=]+(,[a-z_]+=[^,=]+)*$' "key=value,key=value"; fi
if [[ -n "$NODE_RANK" ]]; then require NODE_RANK '^[0-9]+$' "this node's number, 0 to NNODES - 1"; fi
command -v torchrun >/dev/null || complain "torchrun is neither in .venv nor on PATH: run ./launch/setup.sh once first"
if [[ $problems -gt 0 ]]; then
    echo "node.sh: $problems problem(s); ./launch/node.sh --help shows an example" >&2
    exit 2
fi
set_ranks

conf=${RDZV_CONF:-}
if [[ -n "$NODE_RANK" ]]; then # else torchrun compares MASTER with this node's names, which fails behind some DNS
    conf="is_host=$([[ $NODE_RANK -eq 0 ]] && echo true || echo false)${conf:+,$conf}"
fi
MAX_RESTARTS=${MAX_RESTARTS:-$([[ $NNODES == *:* ]] && echo 10 || echo 0)}
if [[ $NNODES == *:* || $MAX_RESTARTS -gt 0 ]]; then
    # torchrun's own store for the ranks keeps its first address: a node that comes back would wait for one in vain.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
options=(--nnodes "$NNODES" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS")
options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER" --rdzv-id "$JOB_ID" ${conf:+--rdzv-conf "$conf"})
options+=(${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"})
echo "node.sh: node ${NODE_RANK:-?} of $NNODES, $NPROC ranks, meeting at $MASTER"
supervise torchrun "${options[@]}" -m rec.train "$@"
