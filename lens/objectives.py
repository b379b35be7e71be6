"""What is minimised: an objective is a rollout without gradient and a loss, both pure, and the keys that it reads.

rollout.read(base, batch, layer=…) -> Rollout, its activations alone; rollout(lens, base, roll, key, hp) -> Rollout;
loss(lens, base, roll, key, hp, knobs, reference) -> (loss, out). hp is what changes the program; knobs are the
numbers of this micro-step (KNOBS), arrays; `reference` is the decoder at the start of the phase, where hp needs it.
gradient(objective, …) makes a step of them, all at once or in slices: the rollout that a loss is given may be a part of
the documents. Scalars, loss included, then add up to those of the whole (Counted); arrays of `out` have a row for each
row of the rollout.

batch: tokens [B, S], positions [B, P] and, for sft, responses `explanations` [B, P, T]. A = subject stream after block
`layer`, N = B * P of them; or stored `activations` [B, P, D] in place of tokens. The decoder is given A or, with hp.layers,
the streams after those blocks at the same position. Formulas: losses.py.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lens import gumbel as relaxed
from lens import losses, policy, sharding
from lens.losses import comparable, error_rows
from lens.models import decoder as dec
from lens.models import subject
from lens.models.encoder import encode, encode_context, encode_rows
from lens.models.lens import Lens
from lens.models.streams import Stream, by_slices
from lens.models.transformer import model_of
from lens.response import Found, between, find
from lens.rollout import (
    COPIES,
    Counted,
    Hparams,
    Knobs,
    Rollout,
    given_rollout,
    in_rows,
    no_rollout,
    per_activation,
    per_document,
    sampled_rollout,
    vectors,
)

REFERENCES = ('natural', 'start')  # what the KL holds the decoder to
# Keys of a phase whose value is a schedule, and so an argument of a step.
KNOBS = (
    *('tau', 'mse_weight', 'kl_weight', 'lm_weight', 'beta', 'entropy_weight', 'entropy_clamp'),
    *('copy_price', 'length_price', 'length_free', 'mismatch'),
)
# Of what a loss returns, for `figures`.
ARRAYS = ('pred_NxD', 'logp_NxT', 'reward_N', 'advantage_N', 'copied_N', 'agree_N', 'quote_AxD')
QUOTES = 2**31 - 1  # folded into the key of a step for the contexts without words; sampling folds in indices of tokens
# Keys of a phase that only some objectives read (Objective.reads), with the value that asks for nothing.
OPTIONAL = dict.fromkeys(('lm_weight', 'beta', 'kl_top', 'entropy_weight', 'copy_price', 'length_price'), 0)
OPTIONAL |= dict.fromkeys(('length_free', 'mismatch', 'reward_ema', 'reward_lag', 'prefix_min', 'prefix_max'), 0)
OPTIONAL |= {'mean_of': 1, 'updates': 1, 'slices': 1, 'reward': 'error', 'policy': 'ppo', 'aggregate': 'tokens'}
OPTIONAL |= {'drop_equal': False, 'encoder_texts': 'all'}
PREFIX = ('prefix_min', 'prefix_max')
ENCODER_TEXTS = ('all', 'best')  # of a group, those that the encoder learns from


def sft(lens: Lens, base, roll: Rollout, key, hp: Hparams, knobs: Knobs, reference):
    """Adds the decoder's cross-entropy of given explanations and the encoder's error on the same texts."""
    del key, reference
    c = roll.counted
    words = _words(_scored(lens.decoder, base, roll), base, roll, hp, ())
    ce = losses.cross_entropy(words['logp'], c.mask_NxT, c.tokens)
    loss, out = 0.0, {}
    if hp.on & {'mse_weight', 'kl_weight'}:
        pred = _read_back(lens.encoder, base, roll, c.found, hp)
        loss, out = _reconstruction(base, roll, pred, hp, knobs)
    entropy = losses.masked_mean(words['entropy'], c.mask_NxT, c.tokens)
    return ce + loss, {'loss_decoder': ce, 'entropy_nats': entropy} | out


def grpo(lens: Lens, base, roll: Rollout, key, hp: Hparams, knobs: Knobs, reference):
    """Trains on sampled explanations: decoder by policy gradient, encoder by its error on the same samples.

    The samples are constants: the decoder gets gradient from the policy gradient, the KLs and the entropy bonus only,
    the encoder from its error alone.
    """
    del key
    c, worth, priced = roll.counted, policy.REWARDS[hp.reward], {}
    pred = _read_back(lens.encoder, base, roll, c.found, hp)
    error = error_rows(pred if roll.judged_NxD is None else roll.judged_NxD, roll.a_NxD, hp.error)
    reward = worth(error)
    if 'copy_price' in hp.on:
        priced['copied_N'] = _copied(roll, hp)
        reward -= knobs['copy_price'] * priced['copied_N']
    reward = jnp.where(c.found.found_N, reward, worth(policy.FAILED))
    if 'length_price' in hp.on:
        reward -= knobs['length_price'] * jnp.maximum(c.found.end_N - knobs['length_free'], 0)

    words = _words(_scored(lens.decoder, base, roll), base, roll, hp, reference)
    advantage, roll, agree = _taught(roll, error, jax.lax.stop_gradient(reward), words['logp'], hp, knobs)
    loss, out = _reconstruction(base, roll, pred, hp, knobs)
    weights, total = _aggregate(_scored_tokens(roll, hp), c.tokens, hp)
    old = roll.logp_NxT if hp.updates > 1 or hp.policy != 'ppo' else None  # on-policy there is no ratio to clip
    gain = policy.policy_gradient(words['logp'], advantage, weights, old, knobs['clip'], total, hp.policy)
    language, more = _language(words, roll, hp, knobs)
    if 'entropy_weight' in hp.on:
        entropy = losses.clamped_entropy(words['entropy'], c.mask_NxT, knobs['entropy_clamp'])
        language -= knobs['entropy_weight'] * entropy / hp.slices  # a mean over rows, of which a slice has its share
    out |= priced | agree | more | {'loss_decoder': gain, 'reward_N': reward, 'advantage_N': advantage}
    return loss + gain + language, out


def gumbel(lens: Lens, base, roll: Rollout, key, hp: Hparams, knobs: Knobs, reference):
    """Trains on sampled explanations by one backward pass through the words, straight-through (gumbel.py)."""
    model = model_of(lens.encoder, base)
    drawn = relaxed.rollout(
        lens.decoder,
        base,
        vectors(lens.decoder, roll),
        jax.lax.stop_gradient(model.table),
        key,
        length=hp.length,
        tau=knobs['tau'],
        form=hp.form,
    )
    roll = _count(roll._replace(ids_NxT=drawn.ids_NxT, logp_NxT=drawn.logp_NxT), hp, knobs)
    c = roll.counted
    rows = model.lookup(drawn.ids_NxT)  # an encoder with its own table gets a lookup's gradient as well
    rows = drawn.words_NxTxW + rows - jax.lax.stop_gradient(rows)
    pred = encode_rows(lens.encoder, base, rows, roll.source, c.found.span if hp.tags else None)
    loss, out = _reconstruction(base, roll, pred, hp, knobs)
    words = _words(drawn.stream, base, roll, hp, reference)
    language, more = _language(words, roll, hp, knobs)
    if 'entropy_weight' in hp.on:
        language -= knobs['entropy_weight'] * losses.masked_mean(words['entropy'], c.mask_NxT, c.tokens)
    return loss + language, figures(roll, out | more, hp) | {'tau': jnp.maximum(knobs['tau'], relaxed.MIN_TAU)}


@dataclasses.dataclass(frozen=True)
class Objective:
    """One entry of OBJECTIVES.

    reads: of OPTIONAL and `group`, the keys of a phase that it reads. shows: (metric, words) that a progress line
    begins with. samples: it learns from texts of its own, which may collapse; otherwise from given explanations.
    """

    rollout: Callable
    loss: Callable
    reads: frozenset[str] = frozenset()
    shows: tuple[tuple[str, str], ...] = ()
    samples: bool = True


OBJECTIVES = {
    'sft': Objective(
        given_rollout, sft, frozenset({'slices', *PREFIX}), shows=(('loss_decoder', 'decoder loss'),), samples=False
    ),
    # the policy-gradient loss is 0 by construction: show what it maximises
    'grpo': Objective(sampled_rollout, grpo, frozenset({'group', *OPTIONAL}), (('reward', 'reward'),)),
    'gumbel': Objective(
        no_rollout, gumbel, frozenset({'lm_weight', 'beta', 'kl_top', 'entropy_weight'}), (('entropy_nats', 'entropy'),)
    ),
}


def gradient(objective: Objective, lens: Lens, base, roll: Rollout, key, hp: Hparams, knobs: Knobs, reference):
    """Returns (gradient of the loss on a whole rollout, metrics); hp.slices above 1: in float32, summed over slices."""
    if roll.ids_NxT is not None:
        roll = _count(roll, hp, knobs)
    if hp.context and 'mse_weight' in hp.on:
        roll = roll._replace(shown_A=_shown(roll.batch['positions'].size, hp.context, key))

    def loss(lens: Lens, part: Rollout):
        value, out = objective.loss(lens, base, part, key, hp, knobs, reference)
        if part.shown_A is not None:
            mse, quotes = _quotes(lens.encoder, base, part, hp)
            value, out = value + knobs['mse_weight'] * mse, out | quotes
        return value, out

    def of_part(part: Rollout):
        return jax.grad(loss, has_aux=True)(lens, part)

    def add(sums, part: Rollout):
        grads, out = of_part(part)
        return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, grads), out

    if hp.slices == 1:
        grads, out = of_part(roll)
    else:
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), lens)
        grads, out = jax.lax.scan(add, zeros, sharding.slices(roll, hp.slices))
        out = jax.tree.map(lambda x: x.sum() if x.ndim == 1 else sharding.joined(x), out)
    return grads, figures(roll, out, hp)


def figures(roll: Rollout, out: dict, hp: Hparams) -> dict[str, jax.Array]:
    """Returns the metrics of a whole rollout: the scalars of `out`, and figures that are no sums from its arrays.

    In the FVE a failed response is the zero vector, as in evaluation.
    """
    c, metrics = roll.counted, {k: x for k, x in out.items() if k not in ARRAYS}
    if 'pred_NxD' in out:
        shown = comparable(out['pred_NxD'], hp.error) * _kept(c.found, hp)[:, None]
        metrics['fve'] = losses.fve(shown, comparable(roll.a_NxD, hp.error), group=per_activation(roll))
        if hp.tags:
            extracted = c.found.found_N.astype(jnp.float32)
            metrics['extracted'] = jnp.mean(extracted)
            metrics['response_tokens'] = jnp.mean(c.found.end_N.astype(jnp.float32))
            metrics['text_len'] = losses.masked_mean(c.found.length_N.astype(jnp.float32), extracted)
    if 'quote_AxD' in out:
        metrics['fve_quote'] = quote = _fve_quote(roll, out['quote_AxD'], hp)
        if 'fve' in metrics:
            metrics['fve_beyond'] = 1 - (1 - metrics['fve']) / jnp.maximum(1 - quote, 1e-12)
    if 'logp_NxT' in out:
        metrics['repeated'] = losses.repeated(roll.ids_NxT, c.mask_NxT)
        if roll.logp_NxT is not None:
            gap = jnp.abs(out['logp_NxT'] - roll.logp_NxT)
            metrics['logp_diff_max'] = jnp.max(gap * c.mask_NxT)
            metrics['logp_diff_mean'] = losses.masked_mean(gap, c.mask_NxT)
    if 'reward_N' in out:
        reward = out['reward_N']
        metrics['reward'], metrics['reward_std'] = jnp.mean(reward), jnp.std(reward)
        metrics['reward_group_std'] = jnp.mean(jnp.std(reward.reshape(-1, hp.group * hp.mean_of), axis=1))
        metrics['zero_advantage_fraction'] = jnp.mean(jnp.abs(out['advantage_N']) < 1e-6)
    if 'agree_N' in out:
        metrics['mismatched'] = 1 - jnp.mean(out['agree_N'])
    if 'copied_N' in out:
        metrics['copied'] = jnp.mean(out['copied_N'])
    return metrics


def _copied(roll: Rollout, hp: Hparams):
    """Which share of the length of a response are words that stand among the last COPIES tokens of the source [N]."""
    recent_NxR = roll.source.tokens_NxR[:, -COPIES:]
    return losses.copied_rows(roll.ids_NxT, roll.counted.found.inside(hp.length), recent_NxR)


def _shown(activations: int, context: int, key):
    """How many tokens of the context stand alone, of each activation: all for every second one, else 0..context.

    All of it is what figures compare with, so half of the work goes there; shorter ones make those of fewer tokens fair.
    """
    which, how_many = jax.random.split(jax.random.fold_in(key, QUOTES))
    full = (jnp.arange(activations) + jax.random.bernoulli(which)) % 2 == 0
    return jnp.where(full, context, jax.random.randint(how_many, (activations,), 0, context + 1))


def _quotes(encoder, base, roll: Rollout, hp: Hparams):
    """The encoder's error on the context alone, a mean over activations, of which a slice has its share; its arrays.

    What the words add is told against an encoder that was trained without them as well, with the same weight.
    """
    a, source = _once(roll, (roll.a_NxD, roll.source))
    shown_A = sharding.reshard(roll.shown_A, sharding.rows(1))
    pred = encode_context(encoder, base, source, shown_A, hp.tags.no_words)
    mse = jnp.mean(error_rows(pred, a, hp.error)) / hp.slices
    return mse, {'loss_quote': mse, 'quote_AxD': pred}


def _fve_quote(roll: Rollout, quote_AxD, hp: Hparams):
    """FVE of the whole context without words, over those activations that it was shown of."""
    full = (roll.shown_A == hp.context).astype(jnp.float32)
    return losses.fve(comparable(quote_AxD, hp.error), comparable(_once(roll, roll.a_NxD), hp.error), mask_N=full)


def _once(roll: Rollout, tree):
    """The first row of every activation in arrays of N rows."""
    a = roll.batch['positions'].size
    return jax.tree.map(lambda x: x.reshape(a, -1, *x.shape[1:])[:, 0], tree)


def _kept(found: Found, hp: Hparams):
    """1 for each row whose response, like all that are averaged with it, holds an explanation [N]."""
    return subject.tile_rows(found.found_N.astype(jnp.float32).reshape(-1, hp.mean_of).min(1), hp.mean_of)


def _count(roll: Rollout, hp: Hparams, knobs: Knobs) -> Rollout:
    """Says what counts. A difference to the next document does where both responses hold an explanation."""
    found = find(roll.ids_NxT, hp.tags)
    mask, kept = found.mask(hp.length), _kept(found, hp)
    if hp.resample:
        kept = kept * jnp.roll(kept, per_document(roll))
    tokens, kl_tokens = jnp.sum(mask), jnp.sum(mask * (jnp.arange(hp.length) >= knobs['kl_skip']))
    rows = kept
    if hp.encoder_texts == 'best':  # one of each group that has any
        rows = kept.reshape(-1, hp.group * hp.mean_of).max(1) * hp.mean_of
    return roll._replace(counted=Counted(found, mask, mask, kept, tokens, kl_tokens, jnp.sum(rows)))


def _read_back(encoder, base, roll: Rollout, found: Found, hp: Hparams):
    """Reconstructs from the words of every row, or the first of them, NxD; of mean_of contiguous rows the mean, in each."""
    if roll.words_N is not None:
        found = found._replace(length_N=jnp.minimum(found.length_N, roll.words_N))
    ids_NxT, span = between(roll.ids_NxT, found, hp.tags)
    span = span if roll.words_N is None else span or found.span  # without tags all tokens are words, but of a prefix
    pred = encode(encoder, base, ids_NxT, roll.source, span)
    if hp.mean_of == 1:
        return pred
    return subject.tile_rows(pred.reshape(-1, hp.mean_of, pred.shape[-1]).mean(1), hp.mean_of)


def judge(encoder, base, roll: Rollout, hp: Hparams) -> Rollout:
    """Adds to a sampled rollout what rewards are of: the reconstructions of another encoder than the one that learns."""

    def of_part(part: Rollout):
        return _read_back(encoder, base, part, find(part.ids_NxT, hp.tags), hp)

    if hp.slices == 1:
        return roll._replace(judged_NxD=of_part(roll))
    return roll._replace(judged_NxD=sharding.joined(jax.lax.map(of_part, sharding.slices(roll, hp.slices))))


def _taught(roll: Rollout, error_N, reward_N, logp_NxT, hp: Hparams, knobs: Knobs):
    """Returns advantages, the rollout with what teaches among what counts, and an array for `figures`.

    What means are divided by stays: what is left out does not make the rest heavier, and slices need not know of each
    other. Samples that are averaged share the worst reward among them: a failed one fails them all.
    """
    c, out = roll.counted, {}

    def shared(x_N):
        return x_N.reshape(-1, hp.mean_of).min(1)

    def rows(x):
        return subject.tile_rows(x, hp.mean_of)

    reward, teaches = shared(reward_N), jnp.ones_like(reward_N)
    if hp.drop_equal:
        teaches *= rows(policy.varied(reward, hp.group))
    if 'mismatch' in hp.on:
        out['agree_N'] = policy.agree(logp_NxT, roll.logp_NxT, c.mask_NxT, knobs['mismatch'])
        teaches *= out['agree_N']
    kept = c.kept_N * rows(shared(teaches))
    if hp.encoder_texts == 'best':
        kept = rows(policy.best(shared(error_N), shared(kept), hp.group))
    c = c._replace(teach_NxT=c.mask_NxT * teaches[:, None], kept_N=kept)
    return rows(policy.advantages(reward, hp.group, hp.advantage)), roll._replace(counted=c), out


def _scored_tokens(roll: Rollout, hp: Hparams):
    """The tokens that teach by the reward. Those after a prefix that was read had no part in it where the text was closed."""
    c = roll.counted
    if roll.words_N is None:
        return c.teach_NxT
    before = jnp.arange(hp.length) < (c.found.start_N + roll.words_N)[:, None]
    return c.teach_NxT * (before | ~c.found.found_N[:, None])


def _aggregate(mask_NxT, tokens, hp: Hparams):
    """Weights of tokens in a mean of the whole rollout, and what their sum is divided by, as hp.aggregate has it."""
    return policy.AGGREGATES[hp.aggregate](mask_NxT, tokens, len(mask_NxT) * hp.slices)


def _reconstruction(base, roll: Rollout, pred, hp: Hparams, knobs: Knobs):
    """The encoder's terms: its error and the functional KL, over the responses that hold an explanation."""
    c, a, changed = roll.counted, roll.a_NxD, pred
    if hp.resample:
        delta = jnp.roll(a - pred, per_document(roll), axis=0)  # the partner is the next document
        changed = pred + (jax.lax.stop_gradient(delta) if hp.resample_stop_grad else delta)
    mse = losses.masked_mean(error_rows(changed, a, hp.error), c.kept_N, c.kept)
    out = {'loss_encoder': mse, 'pred_NxD': pred}
    loss = knobs['mse_weight'] * mse if 'mse_weight' in hp.on else 0.0
    if 'kl_weight' in hp.on:
        kl = losses.masked_mean(_functional_kl(base, roll, changed, hp), c.kept_N, c.kept)
        out['kl_functional_nats'] = kl
        loss += knobs['kl_weight'] * kl
    return loss, out


def _functional_kl(base, roll: Rollout, pred, hp: Hparams):
    """KL of the subject's next-token distributions at the position itself, A against its reconstruction [N]."""
    if hp.error == 'direction':  # only the direction was learnt
        size = jnp.linalg.norm(roll.a_NxD, axis=-1, keepdims=True)
        pred = pred * size / jnp.maximum(jnp.linalg.norm(pred, axis=-1, keepdims=True), 1e-12)
    positions = jnp.repeat(roll.batch['positions'], per_activation(roll), axis=1)
    shape = (*positions.shape, pred.shape[-1])
    both = jnp.concatenate([roll.a_NxD.reshape(shape), pred.reshape(shape)], axis=1)  # beside one natural stream
    both = sharding.reshard(both, sharding.ACT)
    x = subject.stream_at(base, roll.batch['tokens'], jnp.tile(positions, 2), both, hp.layer)
    streams = {k: Stream(part, base) for k, part in zip(('p', 'q'), jnp.split(x, 2, axis=1), strict=True)}
    return in_rows(by_slices(lambda logits: losses.kl(logits['p'], logits['q']), streams))


def _scored(decoder: dec.Decoder, base, roll: Rollout) -> Stream:
    """Of the texts under teacher forcing."""
    once = _once(roll, vectors(decoder, roll))
    return Stream(dec.teacher_forced(decoder, base, once, roll.ids_NxT), model_of(decoder, base))


def _words(own: Stream, base, roll: Rollout, hp: Hparams, reference) -> dict[str, jax.Array]:
    """Numbers of every token NxT: log-probability and entropy by the decoder, whose stream is `own`; where the loss has
    a KL, the log-probability by its reference (logq) or the KL itself, and that of the natural prefix (kl_lm)."""
    streams, to = {'own': own}, hp.kl_to if 'beta' in hp.on else ''
    if 'lm_weight' in hp.on or to == 'natural':
        natural = dec.natural(base, jnp.asarray(hp.natural_prefix), roll.ids_NxT)
        streams['natural'] = Stream(natural, base)
    if to == 'start':
        streams['start'] = _scored(jax.lax.stop_gradient(reference), base, roll)

    def numbers(logits, ids):
        mine = logits['own']
        out = {'logp': losses.token_log_probs(mine, ids)}
        out['entropy'] = losses.entropy(mine if 'entropy_weight' in hp.on else jax.lax.stop_gradient(mine))
        if to and hp.kl_top:
            out['kl'] = losses.kl_top(mine, logits[to], hp.kl_top)
        elif to:
            out['logq'] = losses.token_log_probs(logits[to], ids)
        if 'lm_weight' in hp.on:
            out['kl_lm'] = losses.kl(logits['natural'], mine)
        return out

    return by_slices(numbers, streams, roll.ids_NxT)


def _language(words: dict, roll: Rollout, hp: Hparams, knobs: Knobs):
    """What keeps the words language: KL to a reference, LM KL to the natural prefix."""
    c, loss = roll.counted, 0.0
    entropy = losses.masked_mean(words['entropy'], c.mask_NxT, c.tokens)
    out = {'logp_NxT': words['logp'], 'entropy_nats': entropy}
    if 'beta' in hp.on:
        mask = c.teach_NxT * (jnp.arange(hp.length) >= knobs['kl_skip'])
        weights, total = _aggregate(mask, c.kl_tokens, hp)
        if hp.kl_top:
            kl = losses.masked_mean(words['kl'], weights, total)
        else:
            kl = losses.k3(words['logp'], words['logq'], weights, total)
        out[f'kl_{hp.kl_to}_nats'] = kl
        loss += knobs['beta'] * kl
    if 'lm_weight' in hp.on:
        out['kl_lm_nats'] = losses.masked_mean(words['kl_lm'], c.teach_NxT, c.tokens)
        loss += knobs['lm_weight'] * out['kl_lm_nats']
    return loss, out
