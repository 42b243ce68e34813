# For jobs of Slurm: `until_the_limit COMMAND …` runs a recipe, and puts the job back into the queue when its time is over.
#
# Slurm sends USR1 to the job's script some minutes before the limit (--signal=B:USR1@300). That hands TERM on to the
# training processes: they write a checkpoint after their step and end, which is an error for the recipe. The job then
# starts again, and its runs go on from their checkpoints. Any other error ends the job.

until_the_limit() {
    local limit="" interrupted code
    trap 'limit=near interrupted=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
    RUN="srun entroformer" "$@" &
    while true; do # `wait` also returns when the signal comes
        interrupted=""
        wait $! && code=0 || code=$?
        [ -n "$interrupted" ] || break
    done
    if [ -n "$limit" ] && [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$code"
}
