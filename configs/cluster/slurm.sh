#!/bin/bash
# A meta-training run on a Slurm cluster: one Ray node per Slurm node, one worker per CPU.
#
#   sbatch configs/cluster/slurm.sh configs/resnet8-imagenet25.yaml
#
# When submitted again or requeued, it continues from the newest checkpoint. It is requeued by Slurm when a node fails or
# the job is preempted, and by itself when the driver dies or the time limit comes, ten times in all. It needs a file
# system that all nodes share (the folder it is submitted from), and an environment with l3rs[metatrain] in .venv.
#SBATCH --job-name=l3rs
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Two minutes before the time limit, this script gets SIGUSR1; the driver saves and exits, and the job is requeued.
# After `scancel`, which sends SIGTERM, the driver saves and exits, too, and that is all.
set -euo pipefail

config=${1:?usage: sbatch slurm.sh CONFIG.yaml [key=value …]}
shift
name=$(basename "$config" .yaml)
source .venv/bin/activate

# Ray listens on all addresses of these nodes, because they must reach each other. Anyone who reaches one could run code
# on it, so this run's nodes share a token that only this user can read.
umask 077
mkdir -p "runs/.tokens"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/runs/.tokens/$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
[ -s "$RAY_AUTH_TOKEN_PATH" ] || openssl rand -hex 32 >"$RAY_AUTH_TOKEN_PATH"
export RAY_worker_niceness=0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${head%%$'\n'*} # not `| head -n 1`, which can end the command before it with SIGPIPE
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
head_ip=${head_ip%% *}
port=$((20000 + SLURM_JOB_ID % 20000))

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$head_ip" --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" \
  --include-dashboard=false --block &
sleep 20
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  # A node that fails ends only its own Slurm task.
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" --no-kill \
    ray start --address="$head_ip:$port" --num-cpus="$SLURM_CPUS_PER_TASK" --block &
fi

# A signal that comes before there is a driver is passed on as soon as there is one.
driver="" requeue="" cancelled=""
trap 'signalled=1 cancelled=1; [ -z "$driver" ] || kill -TERM "$driver"' TERM
trap 'signalled=1 requeue=1; [ -z "$driver" ] || kill -TERM "$driver"' USR1
python -m metatrain.cli run "$config" "$@" \
  execution.backend=ray execution.address="$head_ip:$port" execution.workers=auto execution.autoscaling=true \
  --out "runs/$name" --resume &
early=$requeue$cancelled driver=$! # one command: a trap runs before it or after it
[ -z "$early" ] || kill -TERM "$driver"
while true; do # a signal ends `wait`, not the driver
  signalled="" code=0
  wait "$driver" || code=$?
  [ -n "$signalled" ] || break
done

# Another start changes nothing about wrong input (2) or a full disk (3).
case "$code" in 0 | 2 | 3) ;; *) requeue=1 ;; esac
if [ -n "$requeue" ] && [ -z "$cancelled" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
