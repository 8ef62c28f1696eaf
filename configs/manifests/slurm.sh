#!/usr/bin/env bash
# Purpose:  one pruning run over the nodes of a Slurm allocation: a Ray head on the first, workers on all, for this job alone.
# Command:  sbatch configs/manifests/slurm.sh configs/llama-2-70b-cluster.yaml --set model.path=/models/llama-2-70b
# Needs:    secateur[cluster] in the environment sbatch is called from, and a home directory all nodes see.
# Expect:   `scancel --signal=TERM --batch JOB` stops after the block at hand. Ten minutes before the time limit the job does
#           so by itself, goes back into the queue, and goes on from its run directory; so does one that has lost a node.
#SBATCH --job-name=secateur
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
readonly GO_ON=75      # the exit status of a run that stopped as asked

[ $# -ge 1 ] || { echo "usage: sbatch $0 CONFIG [--set KEY=VALUE …]" >&2; exit 2; }

# A token of this job's own: whoever shares the nodes cannot use its Ray.
mkdir -p "$HOME/.ray"
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$HOME/.ray/slurm-$SLURM_JOB_ID.token
unset RAY_AUTH_TOKEN
(umask 077; python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH")

# Ray's files of this job's own too, on each node: others may have theirs under /tmp/ray.
export RAY_TMPDIR=${TMPDIR:-/tmp}/secateur-$SLURM_JOB_ID RAY_free_objects_batch_size=1
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
address=$first:$((20000 + SLURM_JOB_ID % 20000))
resources=(--num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --disable-usage-stats --block)

background=()
cleanup() {
    for each in "${background[@]}"; do kill "$each" 2>/dev/null || true; done
    rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap cleanup EXIT

srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" \
    ray start --head --port="${address#*:}" --include-dashboard=false "${resources[@]}" &
background+=($!)
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    # Workers that begin before the head answers try again for a while by themselves.
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="$first" \
        ray start --address="$address" "${resources[@]}" &
    background+=($!)
fi

asked="" again="" run=""
stop() { asked=yes; [ -z "$run" ] || kill -TERM "$run" 2>/dev/null || true; }
trap stop TERM
trap 'again=yes; stop' USR1

# The topology is chosen from what is there: so all nodes have to be.
python - "$address" "$SLURM_JOB_NUM_NODES" <<'WAIT' &
import sys, time
import ray
address, wanted = sys.argv[1], int(sys.argv[2])
end = time.monotonic() + 600
while True:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        if sum(node["Alive"] for node in ray.nodes()) >= wanted:
            break
    except (ConnectionError, RuntimeError) as error:
        print(error, file=sys.stderr)
    if time.monotonic() > end:
        sys.exit(f"not all of {wanted} nodes have joined the Ray head at {address} in 600 s")
    time.sleep(2)
WAIT
wait "$!" || [ -n "$asked" ]      # a signal ends it too

status=$GO_ON
if [ -z "$asked" ]; then
    secateur run "$@" --set cluster.address="$address" &
    run=$!
    # A signal ends `wait` early; the run is waited for to its own end.
    while true; do
        wait "$run" && status=0 || status=$?
        kill -0 "$run" 2>/dev/null || break
    done
fi
if [ "$status" -eq "$GO_ON" ] && [ -n "$again" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
