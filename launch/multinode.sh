#!/usr/bin/env bash
# One run on several machines, without ssh between them. Start this on each machine, with the same arguments and its own
# NODE_RANK. The first machine is the one whose address is IP_ADDR.
#
#   IP_ADDR=10.0.0.1 NUM_NODES=2 NODE_RANK=0 launch/multinode.sh cifar10 --outdir runs/cifar10     # on the first
#   IP_ADDR=10.0.0.1 NUM_NODES=2 NODE_RANK=1 launch/multinode.sh cifar10 --outdir runs/cifar10     # on the second
#
# IP_ADDR    address of machine 0, as the others reach it
# NUM_NODES  number of machines; NODE_RANK: this one's number, from 0
# PORT       of machine 0, 29500 by default
# GPUS       processes on each machine; by default as many as it has GPUs
# HOSTFILE   in the place of NUM_NODES and GPUS: "name slots=8", a line for each machine in the order of their numbers
#            (launch/hostfile.example)
#
# A first argument that ends in .py is the script in the place of launch/train.py:
#
#   launch/multinode.sh launch/evaluate.py RUN
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "multinode.sh: $1" >&2
    exit 2
}
number() { # name, value, smallest
    [[ "$2" =~ ^[0-9]{1,6}$ ]] && (( 10#$2 >= $3 )) || fail "$1: '$2' is not a number from $3 on"
}

script="$here/train.py"
if [[ "${1:-}" == *.py ]]; then
    script=$1
    shift
    [[ -f "$script" ]] || fail "$script: no such file"
fi
[[ -n "${IP_ADDR:-}" ]] || fail "IP_ADDR: not set; give the address of machine 0"
[[ -n "${NODE_RANK:-}" ]] || fail "NODE_RANK: not set; give this machine's number, from 0"
number NODE_RANK "$NODE_RANK" 0
number PORT "${PORT:-29500}" 1
command -v deepspeed > /dev/null || fail "deepspeed: no such command; activate the environment that has it"

if [[ -n "${HOSTFILE:-}" ]]; then
    [[ -r "$HOSTFILE" ]] || fail "HOSTFILE: $HOSTFILE cannot be read" # DeepSpeed would go on with this machine alone
    hosts=$(sed -E 's/#.*//; s/^[[:space:]]+//; s/[[:space:]]+$//; /^$/d' "$HOSTFILE")
    wrong=$(grep -nvE '^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*$' <<< "$hosts" | sed -n 1p || true)
    [[ -n "$hosts" ]] || fail "HOSTFILE: $HOSTFILE names no machine"
    [[ -z "$wrong" ]] || fail "HOSTFILE: $HOSTFILE, machine $wrong: expected a line like 'name slots=8'"
    twice=$(awk '{print $1}' <<< "$hosts" | sort | uniq -d | sed -n 1p)
    [[ -z "$twice" ]] || fail "HOSTFILE: $HOSTFILE names $twice twice"
else
    [[ -n "${NUM_NODES:-}" ]] || fail "NUM_NODES: not set; give the number of machines, or a HOSTFILE"
    number NUM_NODES "$NUM_NODES" 1
    : "${GPUS:=$(nvidia-smi -L 2> /dev/null | wc -l)}"
    [[ "$GPUS" != 0 ]] || fail "GPUS: this machine has none; GPUS=2 DS_ACCELERATOR=cpu starts 2 processes on its CPU"
    number GPUS "$GPUS" 1
    hosts=$(for ((node = 0; node < NUM_NODES; node++)); do echo "node-$node slots=$GPUS"; done)
fi
count=$(wc -l <<< "$hosts")
(( NODE_RANK < count )) || fail "NODE_RANK: $NODE_RANK is not below the number of machines, $count"

# Without ssh the names are only labels; the ranks meet at IP_ADDR.
hostfile=$(mktemp)
trap 'rm -f "$hostfile"' EXIT
echo "$hosts" > "$hostfile"
deepspeed --no_ssh --node_rank "$NODE_RANK" --master_addr "$IP_ADDR" --master_port "${PORT:-29500}" \
    --hostfile "$hostfile" "$script" "$@"
