"""How the learning rate goes over a run."""

COOL_DOWN = 0.6  # share of the steps over which the linear schedule goes to zero


def learning_rate_factor(
    step: int, total: int, warmup: float = 0.05, decay: float = 0.75, schedule: str = "steps"
) -> float:
    """Factor on the base learning rate: linear warm-up over 5% of the steps, then

    `steps`: times `decay` at every fifth of the steps (appendix A.5; the released code has 0.5 instead of 0.75);
    `linear`: constant, and over the last 60% of the steps linearly down to 0 (ours, for short budgets);
    `constant`: constant. `decay` has no warm-up: linearly from 1 to 0, for a branch of a constant run.
    """
    if schedule == "decay":
        return 1 - step / total
    warm_steps = max(1, round(warmup * total))
    if schedule == "constant":  # open-ended: its length says nothing about its beginning
        warm_steps = min(warm_steps, 500)
    warm = min(1.0, (step + 1) / warm_steps)
    if schedule == "linear":
        return warm * min(1.0, (total - step) / (COOL_DOWN * total))
    if schedule == "constant":
        return warm
    return warm * decay ** (5 * step // total)
