"""Learning rates by optimizer step."""

import jax.numpy as jnp


def warmup_cosine(peak: float, steps: int, warmup_steps: int, final_fraction: float):
    """Linear warm-up from 0 to `peak`, then a cosine that reaches peak * final_fraction exactly at `steps`.

    floor + (peak - floor)/2 * (1 + cos(pi u)), u = (step - warmup) / (steps - warmup).
    """
    floor = peak * final_fraction

    def schedule(step):
        u = jnp.clip((step - warmup_steps) / max(steps - warmup_steps, 1), 0, 1)
        cosine = floor + 0.5 * (peak - floor) * (1 + jnp.cos(jnp.pi * u))
        return jnp.where(step < warmup_steps, peak * (step + 1) / (warmup_steps + 1), cosine)

    return schedule
