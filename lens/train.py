"""The life of a run: plan, load, restore or begin; then step, log, evaluate, save; at the end figures and a report."""

import contextlib
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from lens import (
    checkpoint,
    checks,
    config,
    distributed,
    evaluate,
    feed,
    files,
    flops,
    lens_init,
    logger,
    objectives,
    optimizer,
    reopen,
    rollout,
    sharding,
)
from lens.checkpoint import Checkpoints
from lens.config import Phase, Run, fires
from lens.interchange.reading import configured
from lens.models.decoder import Decoder
from lens.models.encoder import Encoder
from lens.models.lens import Lens, parameter_count
from lens.places import contents, has_begun, identity, locate
from lens.signals import Stop


class State(struct.PyTreeNode):
    """What a step changes, and where the objective needs it, else (): the decoder at the start of the phase, which it
    compares with, and the encoder that rewards are by, which follows the one that learns."""

    step: jax.Array
    params: Lens
    opt: optax.OptState
    reference: Decoder | tuple = ()
    judge: Encoder | tuple = ()


@functools.partial(jax.jit, static_argnames=('objective', 'hparams', 'tx'), donate_argnames=('state',))
def train_step(state: State, base, roll, key, knobs, *, objective, hparams, tx) -> tuple[State, dict]:
    """Returns the state after one micro-step on what rollout.read gives, and its metrics.

    `base` is an argument, never donated; the randomness is fold_in(key, step); knobs are the numbers of this step
    (Phase.knobs), so that one program serves every learning rate, weight and phase start.
    """
    key = jax.random.fold_in(key, state.step)
    roll = objective.rollout(state.params, base, roll, key, hparams)
    if hparams.judged:
        roll = objectives.judge(state.judge, base, roll, hparams)
    params, opt, metrics = state.params, state.opt, {}
    for _ in range(hparams.updates):
        grads, out = objectives.gradient(objective, params, base, roll, key, hparams, knobs, state.reference)
        with jax.named_scope('update'):
            updates, opt = tx.update(grads, opt, params, knobs['optimizer'])
            params = optax.apply_updates(params, updates)
        # figures of the first update: later ones are off-policy
        metrics = metrics or out | optimizer.step_norms(grads, updates, params, tx.trained)
    judge = state.judge
    if hparams.judged:
        share = knobs['renew']
        judge = jax.tree.map(lambda old, new: (1 - share) * old + share * new, judge, params.encoder)
    return State(state.step + 1, params, opt, state.reference, judge), metrics


def micro_step(phase: Phase, state: State, base, batch, key, knobs) -> tuple[State, dict]:
    """Reads the activations of a batch and takes a step on them: two programs, the second for batches of any width."""
    return train_step(state, base, rollout.read(base, batch, **phase.reading), key, knobs, **phase.program)


def trace(phase: Phase, state: State, base, batch, key) -> tuple[jax.stages.Traced, jax.stages.Traced]:
    """Traces the two programs of micro_step; arrays may be abstract. What cannot run raises here."""
    reading = rollout.read.trace(base, batch, **phase.reading)
    return reading, train_step.trace(state, base, results(reading), key, phase.knobs(0), **phase.program)


def results(traced: jax.stages.Traced):
    """Returns shapes and placements of what a traced program gives, as the arguments of another."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), traced.out_info)


def abstract_state(params: Lens, phase: Phase | None, mesh) -> State:
    """Returns shapes and placements of the state in `phase`, of an abstract lens."""
    opt = jax.eval_shape(phase.tx.init, params) if phase else ()
    step = jax.ShapeDtypeStruct((), jnp.int32)
    opt, step = sharding.with_placement((opt, {'step': step}), mesh, sharding.SPLIT_ABOVE)
    reference = params.decoder if phase and phase.hparams.needs_reference else ()
    judge = params.encoder if phase and phase.hparams.judged else ()
    return State(params=params, opt=opt, reference=reference, judge=judge, **step)


def init_state(params: Lens, phase: Phase | None, mesh, step: int = 0) -> State:
    """Returns a state with a fresh optimizer for `phase`; without one where there is nothing to train."""
    like = abstract_state(params, phase, mesh)
    place = jax.tree.map(lambda x: x.sharding, like.opt)
    opt = jax.jit(phase.tx.init, out_shardings=place)(params) if phase else ()
    copies = jax.tree.map(jnp.copy, (like.reference, like.judge))  # a step donates params
    return State(sharding.put(np.int32(step), like.step.sharding), params, opt, *copies)


class Stopped(Exception):
    """A signal ended the run before its end; its state is saved. The message says at which step."""


def train(cfg, workdir: pathlib.Path, profile: str = '', stop: Stop | None = None) -> dict:
    """Runs or continues a run to its end; returns the summary ({} but on the first process).

    profile: the window of --profile, START:COUNT. stop: what hears signals, if they are to be heard. Raises Stopped after
    a signal, LensError for what a user can mend.
    """
    stop, began = stop or Stop(), time.monotonic()
    given = configured(cfg, locate(cfg, workdir))
    cfg = locate(given, workdir)
    run = config.plan(cfg)
    checks.check_batches(cfg, run.mesh)
    here = identity(given, run)
    with (
        jax.set_mesh(run.mesh),
        logger.Logger(cfg, run, workdir, began) as log,
        contextlib.closing(logger.Profile(profile, workdir, log.say)) as window,
    ):
        abstract = lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh)
        for phase in run.phases:
            jax.eval_shape(phase.tx.init, abstract)  # refuses a table that leaves a parameter out
        if not has_begun(here, workdir, log.say):
            reopen.check_start(cfg, abstract, run.base)
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / 'checkpoints' / str(run.steps)).exists():
            states = [abstract_state(abstract, p, run.mesh) for p in run.phases or (None,)]
            checkpoint.check_disk(workdir, max(map(checkpoint.size, states)), log.say)
        log.say(f'Reading the weights of {cfg.subject.path} ({checkpoint.size(run.base) / 1e9:.2f} GB)')
        run = config.load(cfg, run)
        here |= {'contents': contents(cfg)}

        def always(step: int) -> bool:
            phase = run.phase_of(step)
            return phase is not None and fires(phase.every.keep, step)

        with Checkpoints(workdir / 'checkpoints', cfg.checkpoint, always, log.say) as checkpoints:
            found = checkpoints.resume(here, lambda step: abstract_state(abstract, run.phase_of(step), run.mesh))
            state, info = found or (init_state(reopen.initial_lens(cfg, run), None, run.mesh), {})
            checkpoints.clean()
            if distributed.is_first():
                files.write_json(workdir / 'config.json', here['config'])
            step, key, last_figures = int(state.step), jax.random.key(cfg.seed), None
            initial = functools.cache(lambda: reopen.initial_lens(cfg, run))  # made again when first asked for
            evaluator = evaluate.Evaluator(run)
            log.last_good = lambda: checkpoints.latest_step
            log.open(step, info.get('collapse'))
            sizes = {s: parameter_count(getattr(state.params, s)) for s in optimizer.SIDES}
            log.say(logger.announce(cfg, run, sizes, parameter_count(run.base), step))

            def save(step: int, state: State, batches=None, fve: float | None = None, needed: bool = False) -> None:
                info = here | {'collapse': log.watch.get_state()} | ({'data': batches.get_state()} if batches else {})
                with log.part('checkpoint'):
                    checkpoints.save(step, state, info, fve, needed)

            for phase in [p for p in run.phases if step < p.end]:
                if step == phase.start:
                    state, info = init_state(state.params, phase, run.mesh, step), {}
                batches = _batches(run, phase, info.get('data'))
                work, first = {}, step + 1  # FLOPs of a step by the width of its texts
                for step in range(first, phase.end + 1):
                    every, last = phase.every, step == phase.end
                    with log.part('data'):
                        rows = next(batches)
                        del rows['doc_id']
                        batch = sharding.put_batch(rows, run.mesh, phase.documents)
                        width = rows.get('tokens', rows['positions']).shape[1]
                    window.at(step)
                    compiles = width not in work
                    if compiles:
                        with log.part('step'):
                            log.settle(pause=True)
                        compiling = time.monotonic()
                        log.say(f'Compiling the steps of {phase.name} on rows of {width} tokens')
                    with log.part('compile' if compiles else 'step'):
                        if compiles:
                            programs = trace(phase, state, run.base, batch, key)
                            work[width] = sum(flops.bound_by_compute(x.jaxpr, run.base.config) for x in programs)
                        state, out = micro_step(phase, state, run.base, batch, key, phase.knobs(step - phase.start - 1))
                        stop.begin()
                        log.sent(phase, step, out, work[width])
                        if compiles:
                            log.settle()
                            log.say(f'The first one, with its compilation, took {time.monotonic() - compiling:.0f} s')
                    stopping, values, fve = stop.asked(step), {}, None
                    evaluates = fires(every.evaluate, step) or last
                    drifts = fires(every.drift, step)
                    saves = fires(every.save, step) or fires(every.keep, step) or last or stopping
                    if evaluates or drifts or saves:
                        with log.part('step'):
                            log.settle(pause=True)
                    if evaluates:
                        with log.part('evaluation'):
                            if last:
                                full = functools.partial(evaluator.full, state.params)
                                last_figures = stop.attempt(full) if step == run.steps else full()
                                if last_figures:
                                    values, fve = last_figures.values(), last_figures.fve_quick
                                stopping = stopping or not last_figures
                            else:
                                values = evaluator.quick(state.params)
                                fve = values['fve']
                        if values:
                            log.held_out(phase, step, values, full=last)
                    if drifts:
                        moved = sharding.fetch(optimizer.drift(state.params, initial()))
                        log.write(step, phase, 'drift', {k: float(v) for k, v in moved.items()})
                    if saves or checkpoints.is_best(fve):
                        save(step, state, batches, fve, needed=stopping or step == run.steps)
                        log.write(step, phase, 'time', log.time())
                    if stopping:
                        raise Stopped(f'Stopped at step {step} of {run.steps} by {stop.name}')
            if not run.phases and checkpoints.latest_step is None:  # evaluation of an exported lens
                save(0, state, needed=True)
            stop.saved()
            if last_figures is None:  # restarted after the last step
                with log.part('evaluation'):
                    last_figures = evaluator.full(state.params)
                if run.phases:
                    log.held_out(run.phases[-1], step, last_figures.values(), full=True)
            with log.part('evaluation'):
                reading = evaluator.reading(state.params, here['config'], run.steps, workdir.name)
            return _finish(cfg, run, workdir, here['config'], last_figures, reading, checkpoints, log)


def _batches(run: Run, phase: Phase, iterator_state: dict | None):
    """This process's rows of the batches of a phase, from its start or from where a checkpoint was made."""
    batches = feed.train_batches(
        run.train,
        documents=phase.documents,
        vectors=phase.vectors,
        min_pos=run.min_pos,
        labelled=phase.labelled,
        seed=run.seed + phase.start,
        rows=sharding.local_rows(run.mesh, phase.documents),
    )
    if iterator_state is not None:
        batches.set_state(iterator_state)
    return batches


def _finish(cfg, run: Run, workdir: pathlib.Path, stored: dict, result, reading, checkpoints: Checkpoints, log) -> dict:
    """Writes final figures, samples, summary and report; returns the summary."""
    if not distributed.is_first():
        return {}
    result.figures.update(evaluate.figure_after_sft(workdir, stored))
    summary = (
        result.values()
        | {
            'steps': run.steps,
            'wall_s': round(log.clock.wall_s, 1),
            'config': stored,
            'subject': cfg.subject.path,
            'layer': run.layer,
            'seed': run.seed,
            'activations': result.activations,
            'documents': result.documents,
            'best_step': checkpoints.best_step,
        }
        | log.time()
        | logger.provenance()
    )
    files.write_json(workdir / 'summary.json', summary)
    evaluate.write_results(workdir, result, run.steps, reading)
    return summary
