"""The paper's learning-rate schedule (appendix A.5)."""


def learning_rate_factor(step: int, total: int, warmup: float = 0.05, decay: float = 0.75) -> float:
    """Factor on the base learning rate: linear warm-up over 5% of the steps, then `decay` at every fifth of them.

    The released code decays by 0.5 instead of the paper's 0.75.
    """
    warm = max(1, round(warmup * total))
    return min(1.0, (step + 1) / warm) * decay ** (5 * step // total)
