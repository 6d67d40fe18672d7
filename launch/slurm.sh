#!/usr/bin/env bash
# Trains on the nodes of a Slurm job, one process per task, and restarts all from the last checkpoint after a crash.
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh --config=configs/medium.py --workdir=/shared/m
#   launch/slurm.sh --dry-run --config=...     # only prints what the job would run
#
# Submit it in the project's folder. The run folder has to be on a file system that all nodes share. jax finds the other
# tasks by Slurm's variables, and gives each task one GPU, so start as many tasks per node as it has GPUs. PLATFORM
# (gpu, cpu or tpu), RETRIES (3) and PYTHON (python) are read from the environment.
#
# The codes 0 (done), 2 (a mistake), 3 (a failed check) and 4 (diverged) end the job. 75 (interrupted and saved, near
# the time limit or at a preemption) puts it back into the queue. After any other code the step is started again.
#SBATCH --job-name=smallcoder
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 1 ]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0"
  exit 2
fi
python=${PYTHON:-python}
settings=$("$python" -m launch.platforms "${PLATFORM:-gpu}") || exit 2
# After a mistake all tasks end with 2; --kill-on-bad-exit=1 would replace this code by that of a killed task.
# --wait kills tasks that are still running two minutes after the first one has ended.
step=(srun --kill-on-bad-exit=0 --wait=120 "$python" -m smallcoder_jax.main "$@")
if [ -n "$dry" ]; then
  printf '%s\n' "$settings"
  printf '%q ' "${step[@]}"
  printf '\n'
  exit 0
fi
eval "$settings"
for attempt in $(seq 0 "${RETRIES:-3}"); do
  [ "$attempt" -eq 0 ] || echo "launch: attempt $((attempt + 1))" >&2
  code=0
  "${step[@]}" || code=$?
  case $code in
    0 | 2 | 3 | 4 | 130) exit "$code" ;;
    75)
      scontrol requeue "$SLURM_JOB_ID"
      exit 75
      ;;
  esac
  echo "launch: the step ended with code $code" >&2
done
exit "$code"
