"""Whether the words of a decoder that learns from its own samples collapse: rules over figures of recent steps."""

import copy
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lens.errors import LensError

WINDOW = 20  # steps: the mean of fewer is noise where a step draws some dozens of texts


class Rule(NamedTuple):
    """A sign of collapse. holds(now, first): means of the last WINDOW steps and of the first WINDOW of the phase."""

    metric: str
    holds: Callable[[float, float], bool]
    text: str


# Absolute where the figure means the same in every run, relative to the start of the phase where lengths, prompts
# and vocabularies decide. Healthy runs stay far away: entropy falls to 60-70% of its start, texts keep their length.
RULES = (
    # rewards are of order 1; below this their differences are the rounding of bfloat16 activations
    Rule(
        'reward_group_std',
        lambda now, first: now < 1e-4,
        'the rewards within a group differ by {now:.1e}: nothing tells good texts from bad ones',
    ),
    # 0.05 nats: about one word in a hundred is not the likeliest; a low start alone (a well fitted SFT) is no collapse
    Rule(
        'entropy_nats',
        lambda now, first: now < min(0.05 * first, 0.05),
        'the entropy has fallen from {first:.3g} to {now:.3g} nats per token: the decoder has stopped exploring',
    ),
    Rule(
        'text_len',
        lambda now, first: now < 0.3 * first,
        'the explanations have shrunk from {first:.3g} to {now:.3g} tokens',
    ),
    Rule('extracted', lambda now, first: now == 0, 'no response holds an explanation'),
    # short confident texts repeat within a group in healthy runs too, hence the condition on the start
    Rule(
        'repeated',
        lambda now, first: now > 0.5 and first < 0.25,
        'the share of texts that repeat another has risen from {first:.0%} to {now:.0%}',
    ),
)


class Collapse:
    """Asks RULES at every step of a phase about the means of the last WINDOW steps.

    A rule that begins to hold gives one warning, and the next one after it has not held for more than WINDOW steps.
    With action 'stop', a rule that has held for WINDOW further steps, so that it is true of two windows without a
    common step, raises LensError.
    """

    def __init__(self, action: str):
        self.action = action
        self._state = {'phase': '', 'rules': {}}  # JSON, so that a checkpoint can hold it

    def feed(self, phase: str, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Takes the figures of one step of `phase`, a new name of which starts afresh; returns the new warnings.

        Metrics without a rule are passed over, rules without their metric do not apply.
        """
        if self.action == 'off':
            return []
        if phase != self._state['phase']:
            self._state = {'phase': phase, 'rules': {}}
        warnings = []
        for rule in RULES:
            # without any explanation there is no length: that has a rule of its own
            if rule.metric not in metrics or (rule.metric == 'text_len' and metrics.get('extracted') == 0):
                continue
            # figures of the last steps, mean of the first window, for how many steps the rule has held and has not
            fresh = {'recent': [], 'first': None, 'held': 0, 'quiet': WINDOW + 1}
            s = self._state['rules'].setdefault(rule.metric, fresh)
            s['recent'] = [*s['recent'], float(metrics[rule.metric])][-WINDOW:]
            if len(s['recent']) < WINDOW:
                continue
            now = statistics.fmean(s['recent'])
            s['first'] = now if s['first'] is None else s['first']
            if not rule.holds(now, s['first']):
                s['held'], s['quiet'] = 0, s['quiet'] + 1
                continue
            what = f'{rule.text.format(now=now, first=s["first"])} (phase {phase}, means of {WINDOW} steps)'
            if s['quiet'] > WINDOW:  # one step that differs is in WINDOW means: only a longer pause ends an alarm
                warnings.append(f'Collapse at step {step}: {what}.')
            s['held'], s['quiet'] = s['held'] + 1, 0
            if self.action == 'stop' and s['held'] > WINDOW:
                raise LensError(
                    f'Stopped at step {step}: {what}; lower the learning rate of the decoder '
                    f'({phase}.learning_rate_decoder), raise {phase}.beta or {phase}.entropy_weight, and start in '
                    'another --workdir.'
                )
        return warnings

    def get_state(self) -> dict:
        """Returns JSON for a checkpoint: a run that goes on from it warns and stops where an uninterrupted one does."""
        return copy.deepcopy(self._state)

    def set_state(self, state: dict) -> None:
        self._state = copy.deepcopy(state)
