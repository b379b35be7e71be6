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

from lens import checkpoint, config, data, distributed, evaluate, files, flops, lens_init, logger, optimizer, sharding
from lens.checkpoint import Checkpoints
from lens.config import Phase, Run, fires
from lens.models.decoder import Decoder
from lens.models.lens import Lens, parameter_count
from lens.places import contents, has_begun, identity, locate


class State(struct.PyTreeNode):
    """What a step changes, and the decoder at the start of the phase where its objective compares with it, else ()."""

    step: jax.Array
    params: Lens
    opt: optax.OptState
    reference: Decoder | tuple = ()


@functools.partial(jax.jit, static_argnames=('objective', 'hparams', 'tx'), donate_argnames=('state',))
def train_step(state: State, base, batch, key, knobs, *, objective, hparams, tx) -> tuple[State, dict]:
    """Returns the state after one micro-step and its metrics.

    `base` is an argument, never donated; the randomness is fold_in(key, step); knobs are the numbers of this step
    (Phase.knobs), so that one program serves every learning rate, weight and phase start.
    """
    key = jax.random.fold_in(key, state.step)
    roll = objective.rollout(state.params, base, batch, key, hparams)
    params, opt, metrics = state.params, state.opt, {}
    for _ in range(hparams.updates):
        loss = jax.grad(objective.loss, has_aux=True)
        grads, out = loss(params, base, roll, key, hparams, knobs, state.reference)
        with jax.named_scope('update'):
            updates, opt = tx.update(grads, opt, params, knobs['optimizer'])
            params = optax.apply_updates(params, updates)
        # figures of the first update: later ones are off-policy
        metrics = metrics or out | optimizer.step_norms(grads, updates, params, tx.trained)
    return State(state.step + 1, params, opt, state.reference), metrics


def abstract_state(params: Lens, phase: Phase | None, mesh) -> State:
    """Returns shapes and placements of the state in `phase`, of an abstract lens."""
    opt = jax.eval_shape(phase.tx.init, params) if phase else ()
    step = jax.ShapeDtypeStruct((), jnp.int32)
    opt, step = sharding.with_placement((opt, {'step': step}), mesh, sharding.SPLIT_ABOVE)
    reference = params.decoder if phase and phase.hparams.needs_reference else ()
    return State(params=params, opt=opt, reference=reference, **step)


def init_state(params: Lens, phase: Phase | None, mesh, step: int = 0) -> State:
    """Returns a state with a fresh optimizer for `phase`; without one where there is nothing to train."""
    like = abstract_state(params, phase, mesh)
    place = jax.tree.map(lambda x: x.sharding, like.opt)
    opt = jax.jit(phase.tx.init, out_shardings=place)(params) if phase else ()
    reference = jax.tree.map(jnp.copy, like.reference)  # a step donates params
    return State(sharding.put(np.int32(step), like.step.sharding), params, opt, reference)


class Stopped(Exception):
    """A signal ended the run before its end; its state is saved. The message says at which step."""


def train(cfg, workdir: pathlib.Path, profile: str = '') -> dict:
    """Runs or continues a run to its end; returns the summary ({} but on the first process).

    profile: the window of --profile, START:COUNT. Raises Stopped after a signal, LensError for what a user can mend.
    """
    began, given = time.monotonic(), cfg
    cfg = locate(given, workdir)
    run = config.plan(cfg)
    config.check_batches(cfg, run.mesh)
    here = identity(given, run)
    with (
        jax.set_mesh(run.mesh),
        distributed.Stop() as stop,
        logger.Logger(cfg, run, workdir, began) as log,
        contextlib.closing(logger.Profile(profile, workdir, log.say)) as window,
    ):
        abstract = lens_init.abstract_lens(cfg, run.texts, run.base, run.mesh)
        for phase in run.phases:
            jax.eval_shape(phase.tx.init, abstract)  # refuses a table that leaves a parameter out
        if not has_begun(here, workdir, log.say):
            checkpoint.check_start(cfg, abstract, run.base)
        run = config.load(cfg, run)
        here |= {'contents': contents(cfg)}
        workdir.mkdir(parents=True, exist_ok=True)
        always = [s for p in run.phases for s in range(p.start + 1, p.end + 1) if fires(p.every.keep, s)]
        with Checkpoints(workdir / 'checkpoints', cfg.checkpoint, always, log.say) as checkpoints:
            found = checkpoints.resume(here, lambda step: abstract_state(abstract, run.phase_of(step), run.mesh))
            state, info = found or (init_state(checkpoint.initial_lens(cfg, run), None, run.mesh), {})
            checkpoints.clean()
            if distributed.is_first():
                files.write_json(workdir / 'config.json', here['config'])
            step, key, last_figures = int(state.step), jax.random.key(cfg.seed), None
            initial = functools.cache(lambda: checkpoint.initial_lens(cfg, run))  # made again when first asked for
            evaluator = evaluate.Evaluator(run)
            log.last_good = lambda: checkpoints.latest_step
            log.open(step, info.get('collapse'))
            sizes = {s: parameter_count(getattr(state.params, s)) for s in optimizer.SIDES}
            log.say(logger.announce(cfg, run, sizes, parameter_count(run.base), step))

            def save(step: int, state: State, batches=None, fve: float | None = None) -> None:
                info = here | {'collapse': log.watch.get_state()} | ({'data': batches.get_state()} if batches else {})
                with log.part('checkpoint'):
                    checkpoints.save(step, state, info, fve)

            for phase in [p for p in run.phases if step < p.end]:
                if step == phase.start:
                    state, info = init_state(state.params, phase, run.mesh, step), {}
                batches = _batches(run, phase, info.get('data'))
                program = {'objective': phase.objective, 'hparams': phase.hparams, 'tx': phase.tx}
                first = step + 1
                for step in range(first, phase.end + 1):
                    every, last = phase.every, step == phase.end
                    with log.part('data'):
                        rows = next(batches)
                        del rows['doc_id']
                        batch = sharding.put_batch(rows, run.mesh, phase.documents)
                    window.at(step)
                    knobs = phase.knobs(step - phase.start - 1)
                    with log.part('compile' if step == first else 'step'):
                        if step == first:
                            traced = train_step.trace(state, run.base, batch, key, knobs, **program)
                            log.flops[phase.name] = flops.by_scope(traced.jaxpr, run.base.config)
                        state, out = train_step(state, run.base, batch, key, knobs, **program)
                        log.sent(phase, step, out)
                        if step == first:
                            log.settle()
                    stopping, fve = stop.asked(step), None
                    evaluates = fires(every.evaluate, step) or last
                    drifts = fires(every.drift, step)
                    saves = fires(every.save, step) or fires(every.keep, step) or last or stopping
                    if evaluates or drifts or saves:
                        with log.part('step'):
                            log.settle(pause=True)
                    if evaluates:
                        with log.part('evaluation'):
                            if last:
                                last_figures = evaluator.full(state.params)
                                values, fve = last_figures.values(), last_figures.fve_quick
                            else:
                                values = evaluator.quick(state.params)
                                fve = values['fve']
                        log.held_out(phase, step, values, full=last)
                    if drifts:
                        moved = sharding.fetch(optimizer.drift(state.params, initial()))
                        log.write(step, phase, 'drift', {k: float(v) for k, v in moved.items()})
                    if saves or checkpoints.is_best(fve):
                        save(step, state, batches, fve)
                        log.write(step, phase, 'time', log.time())
                    if stopping:
                        raise Stopped(f'Stopped at step {step} of {run.steps} by {stop.name}')
            if not run.phases and checkpoints.latest_step is None:  # evaluation of an exported lens
                save(0, state)
            if last_figures is None:  # restarted after the last step
                with log.part('evaluation'):
                    last_figures = evaluator.full(state.params)
            return _finish(cfg, run, workdir, here['config'], last_figures, checkpoints, log)


def _batches(run: Run, phase: Phase, iterator_state: dict | None):
    """This process's rows of the batches of a phase, from its start or from where a checkpoint was made."""
    batches = data.train_batches(
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


def _finish(cfg, run: Run, workdir: pathlib.Path, stored: dict, result, checkpoints: Checkpoints, log) -> dict:
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
    evaluate.write_results(workdir, result, run.steps)
    return summary
