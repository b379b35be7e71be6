"""Formulas and texts against numbers recorded of other trainers of such lenses, on made inputs; docs/conformance.md says which
case each is. With the tokenizers of published models in data/tokenizers, their ids too."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import nla_qwen2_5_7b as recipe
from lens import hf, joints, losses, metrics, policy, response
from lens.interchange import sidecar
from lens.models import injection

RECORDED = json.loads((pathlib.Path(__file__).parent / 'recorded_nla.json').read_text('utf-8'))
SEED = RECORDED['seed']
TOKENIZERS = pathlib.Path(__file__).parents[1] / 'data/tokenizers'
AR = recipe.SUMMARY.replace('<text><text>', '<text>{explanation}')


def numbers(values) -> np.ndarray:
    return np.asarray(values, np.float32)


def test_every_case_names_tests_that_are_there():
    told = (pathlib.Path(__file__).parents[1] / 'docs/conformance.md').read_text()
    assert [int(x) for x in re.findall(r'^\| (\d+) \|', told, re.M)] == [*range(1, 52)]
    for file, name in set(re.findall(r'(test_\w+\.py)::(test_\w+)', told)):
        assert f'\ndef {name}(' in (pathlib.Path(__file__).parent / file).read_text('utf-8'), (file, name)


def test_the_row_of_a_slot_at_a_fixed_norm():
    r = RECORDED['normalise']
    np.testing.assert_allclose(injection.fixed_norm(numbers(r['v']), r['scale']), r['out'], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(('dtype', 'atol'), [('float32', 2e-6), ('bfloat16', 0.04)])
def test_what_is_added_to_the_stream(dtype, atol):
    """In bfloat16 they round three times, this once."""
    r = RECORDED['added']
    want = r['out' if dtype == 'float32' else 'bf16']
    for row, slot in enumerate((2, 1)):
        stream, vector = (jnp.asarray(numbers(r[k][row : row + 1])) for k in ('resid', 'vec'))
        got = injection.add_norm_matched(stream.astype(dtype), (slot,), vector)
        np.testing.assert_allclose(np.asarray(got, np.float32)[0], want[row], rtol=0, atol=atol)


def test_errors_and_shares_of_variance():
    r = RECORDED['fve']
    pred, gold = [np.array(r[k]) / np.linalg.norm(r[k], axis=1, keepdims=True) * 4 for k in ('pred', 'gold')]
    for baseline, share in ((metrics.rawvar, 'fve_nrm'), (metrics.meannorm, 'fve_meannorm')):
        documents = np.arange(len(gold))
        np.testing.assert_allclose(baseline(gold, documents)[0], r[baseline.__name__], rtol=1e-6)
        got = metrics.fve_over(baseline, pred, gold, documents)['value']
        np.testing.assert_allclose(got, r[share], rtol=1e-6)
    for name in ('perfect', 'orth', 'anti', 'zero'):
        r = RECORDED[f'loss_{name}']
        got = losses.direction_mse_rows(numbers(r['pred']), numbers(r['gold']))
        np.testing.assert_allclose(got, r['value'], rtol=1e-6, atol=1e-6)


def test_losses_of_the_first_trainer():
    r = SEED['advantages']
    for r in (SEED['advantages'], SEED['advantages_tied']):
        reward = -losses.normalised_mse_rows(numbers(r['A_train']), numbers(r['A']))
        np.testing.assert_allclose(policy.advantages(reward, r['group']), r['advantages'], rtol=1e-5, atol=1e-6)
    r = SEED['k3']
    logp, logq = numbers(r['logp']), numbers(r['logq'])
    for skip, want in ((0, r['value']), (3, r['skip3'])):
        mask = np.broadcast_to(np.arange(logp.shape[1]) >= skip, logp.shape)
        np.testing.assert_allclose(losses.k3(logp, logq, mask.astype(np.float32)), want, rtol=1e-6)
    r = SEED['kl']
    got = losses.kl(numbers(r['logits_orig']), numbers(r['logits_approx'])).mean()
    np.testing.assert_allclose(got, r['value'], rtol=1e-6)
    r = SEED['entropy']
    np.testing.assert_allclose(losses.entropy(numbers(r['logits'])).mean(), r['value'], rtol=1e-6)
    # theirs clamps probabilities at 1e-10 and finds 0.00046 in the 201,088 words that cannot be
    assert losses.entropy(60.0 * (np.arange(201088) == 0)[None].astype(np.float32))[0] < 1e-12


def test_a_whole_step_of_the_first_trainer():
    r = SEED['grpo']
    weights, want, ids = r['weights'], r['result'], np.array(r['ids'])
    logp, ones = np.log(numbers(r['probs'])), np.ones(ids.shape, np.float32)
    natural = numbers(r['natural_logits'])[:, r['prefix_len'] - 1 : r['prefix_len'] - 1 + ids.shape[1]]
    late = ones * (np.arange(ids.shape[1]) >= weights['skip_tokens_KL_GRPO'])
    error = losses.normalised_mse_rows(numbers(r['A_hat']), numbers(r['A']))
    apart = losses.k3(logp, losses.token_log_probs(natural, ids), late)
    gain = policy.policy_gradient(logp, policy.advantages(-error, weights['group_n']), ones)
    entropy = losses.clamped_entropy(numbers(r['entropy']), ones, weights['entropy_clamp'])
    mse = error.mean()
    loss = gain + weights['GRPO_beta'] * apart
    got = {'mse': mse, 'entropy': entropy, 'KL_GRPO': apart, 'loss_GRPO': loss}
    got['total'] = loss - weights['entropy_weight'] * entropy + mse
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=2e-5, err_msg=name)


# ---- ids of published tokenizers ----


@pytest.fixture(scope='module', params=['qwen3', 'llama3_1', 'gemma3'])
def published(request):
    """(tokenizer, name, its prompts and tags)"""
    folder = TOKENIZERS / request.param
    if not folder.is_dir():
        pytest.skip(f'{folder} is not there: `make tokenizers` makes it')
    tokenizer, marker = hf.load_tokenizer(folder), RECORDED[f'marker_{request.param}']
    ids = response.reader(tokenizer, len(tokenizer))
    beside = [
        x if k else (tokenizer.bos_token or '') * bool(marker['bos']) + x
        for k, x in enumerate(AR.split('{explanation}'))
    ]
    prompt = ids(beside[0], ''), ids(beside[1], '')
    joined = joints.build(tokenizer, beside, prompt, (recipe.OPEN, recipe.CLOSE), len(tokenizer))
    return tokenizer, marker, RECORDED[f'ar_ids_{request.param}'], joined.cut_off(*prompt), joined


@pytest.mark.slow
def test_prompts_have_the_published_ids(published):
    tokenizer, marker, *_ = published
    av = recipe.EXPLAIN.replace('<embed>', '{injection_char}')
    more = {'marker': marker['char'], 'marker_id': marker['ids'][0], 'left': marker['left'], 'right': marker['right']}
    more |= {'suffix': tuple(marker['suffix_ids']), 'decoder_template': av, 'encoder_template': AR, 'd_model': 48}
    told = sidecar.Sidecar(
        pathlib.Path('x'),
        'nla_model',
        'decoder',
        '',
        layer=1,
        family='replace',
        injection_scale=1.0,
        mse_scale=1.0,
        **more,
    )
    prompt = told.prompt(tokenizer)
    assert tokenizer(prompt, add_special_tokens=False)['input_ids'] == marker['prompt_ids']
    told._check_marker(lambda x: tokenizer(x, add_special_tokens=False)['input_ids'], tokenizer.unk_token_id, prompt)
    assert marker['prompt_ids'][marker['marker_index']] == marker['ids'][0]
    if marker['char'] == '㈎':  # Qwen: the recipe of the released lens, whose chat has a system turn
        ids = response.reader(tokenizer, len(tokenizer))
        d = recipe.get_config().decoder
        slot = response.decoder_prompt(ids, d.prompt, d.marker)
        at = len(slot.left)
        assert (at, at + 1 + len(slot.right), slot.left[-1], slot.right[0], slot.marker) == (111, 125, 29, 522, 149705)


@pytest.mark.slow
def test_explanations_are_found_and_read_as_published(published):
    """However the tags are joined with the words: with line breaks of their own, as they are written, and without."""
    tokenizer, _, texts, (left, right), joined = published
    tags = response.tags(response.reader(tokenizer, len(tokenizer)), recipe.OPEN, recipe.CLOSE, '', joined)
    forms = [
        '<explanation>\n{}\n</explanation>',
        '<explanation>{}</explanation>',
        'So: <explanation>{}\n\n</explanation>.\n',
    ]
    made = [form.format(x['text']) for form in forms for x in texts] + [x['response'] for x in RECORDED['extraction']]
    rows = [tokenizer(x, add_special_tokens=False)['input_ids'] for x in made]

    @jax.jit
    def read(ids):
        found = response.find(ids, tags)
        return found, response.words(ids, found, tags), response.between(ids, found, tags)

    found, words, (ids, (start, length)) = jax.tree.map(np.asarray, read(joints.padded(rows, 0)))
    assert found.found_N.all()
    got = [[*left, *row[a : a + n].tolist(), *right] for row, a, n in zip(ids, start, length, strict=True)]
    assert got[: 3 * len(texts)] == 3 * [x['ids'] for x in texts]
    said = [row[a : a + n] for row, a, n in zip(words, *found.span, strict=True)]
    want = [x['text'] for x in texts] * 3 + [x['training'] for x in RECORDED['extraction']]
    assert [tokenizer.decode(x).strip() for x in said] == want
    assert [[*left, *joined.exact(x), *right] for x in said[: len(texts)]] == [x['ids'] for x in texts]
