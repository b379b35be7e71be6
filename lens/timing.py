"""The parts of one training step, which is one program: measured by running the beginnings of it as programs."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax

from lens import objectives

REPEATS = 3


def split_step(prefixes: Mapping[str, Callable[[], object]], now=time.perf_counter) -> dict[str, float]:
    """{part}_s in seconds, and step_s, which they add up to.

    prefixes: by the name of its last part, a program that runs the step up to the end of that part, the whole step
    last. Each runs once to compile and REPEATS times in turn with the others; medians count. A beginning cannot take
    longer than what it is the beginning of: where noise says so, the shorter time stands and the part is 0.
    """
    for program in prefixes.values():
        jax.block_until_ready(program())
    taken: dict[str, list[float]] = {name: [] for name in prefixes}
    for _ in range(REPEATS):
        for name, program in prefixes.items():
            begin = now()
            jax.block_until_ready(program())
            taken[name].append(now() - begin)
    ends = [statistics.median(t) for t in taken.values()]
    for i in reversed(range(len(ends) - 1)):
        ends[i] = min(ends[i], ends[i + 1])
    parts = (end - begin for begin, end in zip([0.0, *ends], ends, strict=False))
    return dict(zip((f'{name}_s' for name in prefixes), parts, strict=True)) | {'step_s': ends[-1]}


def step_prefixes(step, state, base, batch, key, *, objective, hparams, tx, start=0) -> dict[str, Callable]:
    """The beginnings of train.train_step, for split_step; the arguments are that function, as `step`, and its own.

    extraction: the activations are read. sampling: the rollout (nothing more for sft; gumbel samples inside its loss).
    scoring: the losses and their gradients. update: the whole step. Nothing is donated, so that training goes on
    from `state`, and the measurement needs room for the trained parameters and optimizer state a second time.
    """

    def extraction(state, base, batch, key):
        return objectives.read(base, batch, hparams.layer)

    def sampling(state, base, batch, key):
        return objective.rollout(state.params, base, batch, jax.random.fold_in(key, state.step), hparams)

    def scoring(state, base, batch, key):
        roll, params = sampling(state, base, batch, key), state.params
        gradient, key = jax.grad(objective.loss, has_aux=True), jax.random.fold_in(key, state.step)
        for _ in range(hparams.updates):
            grads, figures = gradient(params, base, roll, key, hparams, state.step - start, state.reference)
            # for the next round: equal parameters would let the compiler do the work once
            params = jax.tree.map(lambda p, g: (p - 1e-12 * g).astype(p.dtype), params, grads)
        return grads, figures

    def update(state, base, batch, key):
        return step(state, base, batch, key, objective=objective, hparams=hparams, tx=tx, start=start)

    def bound(program):
        jitted = jax.jit(program)
        return lambda: jitted(state, base, batch, key)

    return {f.__name__: bound(f) for f in (extraction, sampling, scoring, update)}
