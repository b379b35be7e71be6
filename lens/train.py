"""The one loop for every objective: restore, step, metrics of the previous step, evaluate, checkpoint."""

import functools
import hashlib
import json
import pathlib
import time

import jax
import numpy as np
import optax

from lens import build, data, metrics, optimizer, sharding
from lens.build import Phase, Run
from lens.checkpoint import CheckpointError, Checkpoints
from lens.errors import LensError
from lens.evaluate import Evaluation, Evaluator, figure_after_sft, write_results
from lens.models.lens import parameter_count
from lens.state import State, init_lens, init_state, phase_of, restore

# What may differ between a run and its continuation: how often, where; never what is computed.
FREE_KEYS = ('checkpoint', 'log', 'mesh')


class NonFiniteError(LensError):
    """The loss is NaN or infinite; nothing was saved after the last good checkpoint."""


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


def fires(every: int | None, step: int) -> bool:
    """Whether an interval of micro-steps falls on `step`."""
    return bool(every) and step % every == 0


def fingerprint(config: dict) -> str:
    """Digest of the part of a configuration that decides what is computed."""
    kept = {k: v for k, v in config.items() if k not in FREE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


class Trainer:
    """One run in one workdir."""

    def __init__(self, cfg, workdir: pathlib.Path):
        self.cfg, self.workdir = cfg, workdir
        self.config = json.loads(cfg.to_json())
        self.run: Run = build.open_run(cfg)
        self.key = jax.random.key(cfg.seed)
        self.evaluator = Evaluator(self.run)

    def train(self) -> dict:
        """Runs or continues to the end; returns the summary."""
        run, cfg = self.run, self.cfg
        self.workdir.mkdir(parents=True, exist_ok=True)
        with Checkpoints(self.workdir / 'checkpoints', cfg.checkpoint.keep) as self.checkpoints:
            state, iterator_state = self._restore_or_init()
            step = int(state.step)
            for phase in run.phases:  # a table that leaves a parameter out stops here: nothing is written yet
                jax.eval_shape(phase.tx.init, state.params)
            metrics.write_json(self.workdir / 'config.json', self.config)
            self.writer = metrics.Writer(self.workdir, step, cfg.log.tensorboard, cfg.log.wandb_project, self.config)
            self.begin = time.monotonic() - self.writer.elapsed_s
            with metrics.ProgressBar(run.steps, run.steps) as self.bar:
                self._announce(state, step)
                for phase in run.phases:
                    if step < phase.end:
                        if step == phase.start:
                            state = init_state(state.params, phase, run.mesh, step)
                        state = self._phase(phase, state, iterator_state)
                        step, iterator_state = phase.end, None
            if not run.phases and self.checkpoints.latest_step is None:  # evaluation of an exported lens
                self.checkpoints.save(0, state, {'data': None} | self._identity())
            summary = self._finish(state)
            self.writer.close()
        return summary

    def _announce(self, state: State, step: int) -> None:
        c = self.run.base.config
        sizes = {s: f'{parameter_count(getattr(state.params, s)):,}' for s in optimizer.SIDES}
        phases = ', '.join(f'{p.name} {p.end - p.start}' for p in self.run.phases) or 'none, evaluation only'
        self.bar.print(
            f'Subject {self.cfg.subject.path}: {c.family}, {c.n_layers} blocks, {parameter_count(self.run.base):,} '
            f'parameters, read after block {self.run.layer}\n'
            f'Trained: decoder {sizes["decoder"]}, encoder {sizes["encoder"]} parameters\n'
            f'Data {self.cfg.data.path}: {len(self.run.train)} training and {len(self.run.validation)} held-out documents, '
            f'no document in both{self._left_out()}\nSteps: {phases}' + (f'; continuing at step {step}' if step else '')
        )

    def _left_out(self) -> str:
        train, validation, kind = self.run.train.left_out, self.run.validation.left_out, self.cfg.data.positions
        return f'; {train} and {validation} without {kind} tokens left out' if kind != 'any' else ''

    def _restore_or_init(self) -> tuple[State, dict | None]:
        """The newest checkpoint of this workdir, or step 0; and the data iterator's state."""
        run, here = self.run, fingerprint(self.config)
        if self.checkpoints.latest_step is None:
            return init_state(init_lens(self.cfg, run), None, run.mesh), None
        step = self.checkpoints.latest_step
        phase, info = phase_of(run, step), self.checkpoints.info(step)
        if info['fingerprint'] != here:
            raise CheckpointError(
                f'{self.workdir} holds a run with another configuration (differing keys: '
                f'{", ".join(_differing(info["config"], self.config))}): use that configuration or another --workdir.'
            )
        ends = [p.end for p in run.phases]
        if info['phase_ends'] != ends:
            raise CheckpointError(
                f'{self.workdir} holds a run whose phases end at steps {info["phase_ends"]}, now {ends}: epochs are '
                'counted on the training documents, so restore data.path or use another --workdir.'
            )
        state = restore(self.cfg, run, self.checkpoints, step)
        return state, None if phase and step == phase.end else info['data']

    def _phase(self, phase: Phase, state: State, iterator_state: dict | None) -> State:
        cfg, run = self.cfg, self.run
        batches = data.train_batches(
            run.train,
            documents=phase.documents,
            vectors=phase.vectors,
            min_pos=run.min_pos,
            labelled=phase.labelled,
            seed=cfg.seed + phase.start,
        )
        if iterator_state is not None:
            batches.set_state(iterator_state)
        do = functools.partial(
            train_step, objective=phase.objective, hparams=phase.hparams, tx=phase.tx, start=phase.start
        )
        every, pending, clock = phase.every, None, metrics.StepClock()
        self.bar.every = 5 * every.log if every.log else run.steps
        for step in range(int(state.step) + 1, phase.end + 1):
            rows = next(batches)
            doc_ids = rows.pop('doc_id')
            state, out = do(state, run.base, sharding.put_batch(rows, run.mesh), self.key)
            if pending:
                self._record(phase, *pending, clock)
            pending = (step, out, doc_ids)
            evaluate, save = fires(every.evaluate, step), fires(every.save, step)
            if evaluate or save or step == phase.end:
                self._record(phase, *pending, clock)
                pending = None
                clock.pause()
            if step == phase.end:
                self._evaluate(phase, step, state, full=True)
            elif evaluate:
                self._evaluate(phase, step, state, full=False)
            if fires(every.drift, step):
                self._drift(phase, step, state)
            if save or step == phase.end:
                self.checkpoints.save(step, state, {'data': batches.get_state()} | self._identity())
        return state

    def _identity(self) -> dict:
        """What a checkpoint says of the run that it belongs to."""
        ends = [p.end for p in self.run.phases]  # epochs depend on the data as well
        return {'config': self.config, 'fingerprint': fingerprint(self.config), 'phase_ends': ends}

    def _record(self, phase: Phase, step: int, out: dict, doc_ids, clock: metrics.StepClock) -> None:
        """Metrics of a step that has been dispatched before."""
        values = {k: float(v) for k, v in jax.device_get(out).items()}
        if not all(np.isfinite(v) for v in values.values()):
            bad = next(k for k, v in values.items() if not np.isfinite(v))
            last = self.checkpoints.latest_step
            raise NonFiniteError(
                f'{bad} is not finite at step {step} (phase {phase.name}, documents {doc_ids.tolist()}); the last good '
                f'checkpoint is {f"step {last}" if last else "none"} in {self.workdir}: lower the learning rates.'
            )
        step_s = clock.lap()
        if fires(phase.every.log, step) or step == phase.end:
            self.writer.write(
                {'step': step, 'phase': phase.name, 'kind': 'train'}
                | values
                | {'step_s': step_s, 'wall_s': time.monotonic() - self.begin}
            )
        self.bar.update(step, phase.name, values, step_s * (self.run.steps - step))

    def _drift(self, phase: Phase, step: int, state: State) -> None:
        """How far the parameters are from where the run started; that state is made again when first asked for."""
        if not hasattr(self, 'initial'):
            self.initial = init_lens(self.cfg, self.run)
        values = jax.device_get(jax.jit(optimizer.drift)(state.params, self.initial))
        row = {f'drift_{k}': float(v) for k, v in values.items()}
        wall_s = time.monotonic() - self.begin
        self.writer.write({'step': step, 'phase': phase.name, 'kind': 'drift'} | row | {'wall_s': wall_s})

    def _evaluate(self, phase: Phase, step: int, state: State, full: bool) -> None:
        if full:
            self.last: Evaluation = self.evaluator.full(state.params)
            values = self.last.values()
        else:
            values = self.evaluator.quick(state.params)
        self.writer.write(
            {'step': step, 'phase': phase.name, 'kind': 'eval', 'full': full}
            | values
            | {'wall_s': time.monotonic() - self.begin}
        )
        names = ('fve', 'fve_greedy', 'facts_recall', 'facts_hallucinated')
        self.bar.print(f'held out at step {step}: ' + '  '.join(f'{k} {values[k]:.3f}' for k in names if k in values))

    def _finish(self, state: State) -> dict:
        """Final figures, samples, summary and report."""
        if not hasattr(self, 'last'):  # restarted after the last step
            self.last = self.evaluator.full(state.params)
        run = self.run
        self.last.figures.update(figure_after_sft(self.workdir, run))
        summary = (
            self.last.values()
            | {
                'steps': run.steps,
                'wall_s': round(time.monotonic() - self.begin, 1),
                'config': self.config,
                'subject': self.cfg.subject.path,
                'layer': run.layer,
                'seed': run.seed,
                'activations': self.last.activations,
                'documents': self.last.documents,
            }
            | metrics.provenance()
        )
        metrics.write_json(self.workdir / 'summary.json', summary)
        write_results(self.workdir, self.last, run.steps)
        return summary


def _differing(a: dict, b: dict, prefix: str = '') -> list[str]:
    """Dotted keys whose values differ."""
    out = []
    for k in sorted(a.keys() | b.keys()):
        x, y = a.get(k), b.get(k)
        if isinstance(x, dict) and isinstance(y, dict):
            out += _differing(x, y, f'{prefix}{k}.')
        elif x != y and (prefix or k not in FREE_KEYS):
            out.append(prefix + k)
    return out
