"""The one loop for every objective: restore, step, metrics of the previous step, evaluate, checkpoint, stop."""

import contextlib
import functools
import json
import pathlib
import time

import jax
import optax

from lens import checks, config, data, distributed, files, logger, optimizer, resume, sharding
from lens.checkpoint import Checkpoints
from lens.config import Phase, Run, fires
from lens.evaluate import Evaluation, Evaluator, figure_after_sft, write_results
from lens.lens_init import State, check, init_lens, init_state
from lens.logger import Logger, Profile, announce
from lens.models.lens import parameter_count
from lens.tools import flops


@functools.partial(jax.jit, static_argnames=('objective', 'hparams', 'tx', 'start'), donate_argnames=('state',))
def train_step(state: State, base, batch, key, *, objective, hparams, tx, start=0) -> tuple[State, dict]:
    """One micro-step of a phase that began at micro-step `start` of the run. `base` is an argument, never
    donated; the randomness is fold_in(key, step)."""
    key = jax.random.fold_in(key, state.step)
    roll = objective.rollout(state.params, base, batch, key, hparams)
    params, opt, metrics = state.params, state.opt, {}
    for _ in range(hparams.updates):
        loss = jax.grad(objective.loss, has_aux=True)
        grads, out = loss(params, base, roll, key, hparams, state.step - start, state.reference)
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        # figures of the first update: later ones are off-policy
        metrics = metrics or out | optimizer.step_norms(grads, updates, params, tx.trained)
    return State(state.step + 1, params, opt, state.reference), metrics


class Stopped(Exception):
    """A signal ended the run before its end; its state is saved. The message says at which step."""


class Trainer:
    """One run in one workdir. profile: the window of --profile, START:COUNT."""

    def __init__(self, cfg, workdir: pathlib.Path, profile: str = ''):
        self.cfg, self.workdir, self.began = cfg, workdir, time.monotonic()
        self.config = json.loads(cfg.to_json())
        self.run: Run = config.open_run(cfg, self._check)
        self.identity = resume.identity(self.config, self.run)
        self.key = jax.random.key(cfg.seed)
        self.evaluator = Evaluator(self.run)
        self.profile = Profile(profile, workdir, self._say)

    def _check(self, run: Run) -> None:
        """What needs no weights is refused before they are read."""
        checks.check_batches(self.cfg, run.mesh)
        check(self.cfg, run, new=not resume.has_begun(self.config, self.workdir))

    def _say(self, text: str) -> None:
        """To the user; on the bar where there is one."""
        if hasattr(self, 'record'):
            self.record.say(text)
        elif distributed.is_first():
            print(text)

    def train(self) -> dict:
        """Runs or continues to the end; returns the summary. Raises Stopped after SIGTERM or SIGUSR1."""
        run, cfg = self.run, self.cfg
        self.workdir.mkdir(parents=True, exist_ok=True)
        c, always = cfg.checkpoint, [s for p in run.phases for s in p.steps if fires(p.every.keep, s)]
        with (
            contextlib.closing(self.profile),
            distributed.Stop() as self.stop,
            Checkpoints(self.workdir / 'checkpoints', c.keep, c.best, always, self._say) as self.checkpoints,
        ):
            found = resume.newest(cfg, self.identity, run, self.checkpoints, self.workdir)
            state, info = found or (init_state(init_lens(cfg, run), None, run.mesh), {})
            step = int(state.step)
            self.checkpoints.clean()
            if distributed.is_first():
                files.write_json(self.workdir / 'config.json', self.config)
            abstract = jax.eval_shape(lambda x: x, state.params)
            collapse = info.get('collapse')
            with Logger(cfg, run, self.workdir, self.began) as self.record:
                self.record.last_good = lambda: self.checkpoints.latest_step
                for phase in run.phases:
                    parts = flops.step_flops(run.base.config, phase, abstract, run.train.tokens.shape[1])
                    self.record.flops[phase.name] = {k: v for k, v in parts.items() if k != 'sampling'}
                self.record.open(step, collapse)
                sizes = {s: parameter_count(getattr(state.params, s)) for s in optimizer.SIDES}
                self._say(announce(cfg, run, sizes, parameter_count(run.base), step))
                iterator_state = info.get('data')
                for phase in run.phases:
                    if step < phase.end:
                        if step == phase.start:
                            state = init_state(state.params, phase, run.mesh, step)
                        state = self._phase(phase, state, iterator_state)
                        step, iterator_state = phase.end, None
                if not run.phases and self.checkpoints.latest_step is None:  # evaluation of an exported lens
                    self._save(0, state, None)
                return self._finish(state)

    def _save(self, step: int, state: State, iterator_state: dict | None, fve: float | None = None) -> None:
        info = self.identity | {'data': iterator_state}
        with self.record.part('checkpoint'):
            self.checkpoints.save(step, state, info | {'collapse': self.record.watch.get_state()}, fve)

    def _phase(self, phase: Phase, state: State, iterator_state: dict | None) -> State:
        run, every, record = self.run, phase.every, self.record
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
        static = {'objective': phase.objective, 'hparams': phase.hparams, 'tx': phase.tx, 'start': phase.start}
        first = int(state.step) + 1
        for step in range(first, phase.end + 1):
            with record.part('data'):
                rows = next(batches)
                del rows['doc_id']
                batch = sharding.put_batch(rows, run.mesh, phase.documents)
            self.profile.at(step)
            with record.part('compile' if step == first else 'step'):
                state, out = train_step(state, run.base, batch, self.key, **static)
                record.sent(phase, step, out)
                if step == first:
                    record.settle()
            last, stop = step == phase.end, self.stop.asked(step)
            evaluate, save = fires(every.evaluate, step), fires(every.save, step) or fires(every.keep, step)
            drift = fires(every.drift, step)
            if evaluate or save or last or stop or drift:
                with record.part('step'):
                    record.settle(pause=True)
            fve = self._evaluate(phase, step, state, full=last) if evaluate or last else None
            if drift:
                self._drift(phase, step, state)
            if save or last or stop or (fve is not None and self._is_best(fve)):
                self._save(step, state, batches.get_state(), fve)
                record.write(step, phase, 'time', record.time())
            if stop:
                raise Stopped(f'Stopped at step {step} of {run.steps} by {self.stop.name}')
        return state

    def _is_best(self, fve: float) -> bool:
        return self.cfg.checkpoint.best > 0 and fve > self.checkpoints.best_fve

    def _drift(self, phase: Phase, step: int, state: State) -> None:
        """How far the parameters are from where the run started; that state is made again when first asked for."""
        if not hasattr(self, 'initial'):
            self.initial = init_lens(self.cfg, self.run)
        values = sharding.fetch(jax.jit(optimizer.drift)(state.params, self.initial))
        self.record.write(step, phase, 'drift', {f'drift_{k}': float(v) for k, v in values.items()})

    def _evaluate(self, phase: Phase, step: int, state: State, full: bool) -> float:
        """Held-out figures of the first documents, or of all; returns the FVE of the first, to compare checkpoints."""
        with self.record.part('evaluation'):
            if full:
                self.last: Evaluation = self.evaluator.full(state.params)
                values = self.last.values()
            else:
                values = self.evaluator.quick(state.params)
        self.record.held_out(phase, step, values, full)
        return self.last.fve_quick if full else values['fve']

    def _finish(self, state: State) -> dict:
        """Final figures, samples, summary and report."""
        run = self.run
        if not hasattr(self, 'last'):  # restarted after the last step
            with self.record.part('evaluation'):
                self.last = self.evaluator.full(state.params)
        if not distributed.is_first():
            return {}
        self.last.figures.update(figure_after_sft(self.workdir, run))
        summary = (
            self.last.values()
            | {
                'steps': run.steps,
                'wall_s': round(self.record.wall_s, 1),
                'config': self.config,
                'subject': self.cfg.subject.path,
                'layer': run.layer,
                'seed': run.seed,
                'activations': self.last.activations,
                'documents': self.last.documents,
                'best_step': self.checkpoints.best_step,
            }
            | self.record.time()
            | logger.provenance()
        )
        files.write_json(self.workdir / 'summary.json', summary)
        write_results(self.workdir, self.last, run.steps)
        return summary
