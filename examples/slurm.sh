#!/usr/bin/env bash
# One node trains with torchrun, the others run engines with Ray:  sbatch examples/slurm.sh --preset record --minutes 600
# What stands behind the script's name goes to the training. RANKS is the number of training processes, one for each GPU.
#SBATCH --job-name=grpo_chess
#SBATCH --nodes=5
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=1
#SBATCH --time=10:00:00
set -euo pipefail
ranks=${RANKS:-1} port=6379
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
engines=$(( (${#nodes[@]} - 1) * SLURM_CPUS_PER_TASK / ranks ))       # of each training process
[ "$engines" -gt 0 ] || { echo "no node is left for engines: ask for at least two" >&2; exit 2; }
RAY_AUTH_TOKEN="$(python3 -c 'import secrets; print(secrets.token_hex(32))')"      # of this job: nobody else is a node
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

on() { local node=$1; shift; srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" "$@"; }

on "$head" ray start --head --node-ip-address="$head" --port=$port --num-cpus=0 --include-dashboard=false --block &
for node in "${nodes[@]:1}"; do
  on "$node" ray start --address="$head:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
done
# Engines are used as their nodes join: nobody waits for the last one, and one that dies is replaced where there is room.
on "$head" torchrun --nproc-per-node "$ranks" -m grpo_chess.train \
  --engine.where "ray:$head:$port" --engine.processes "$engines" --engine.timeout 120 "$@"
