"""What the sampler of vLLM says about the tokens that it draws, beside our model on the same tokens, both in float32."""

import pathlib

import jax
import numpy as np
import pytest

from data_gen.storyworld import chats as story_chats
from lens import data, hf
from tests.vllm.test_served import CHAT, ROOT, post, served

SMOLLM2, CHATS = ROOT / 'data/smollm2/model', ROOT / 'configs/smollm2_chats'
COUNT, TOKENS = 32, 24
MOST = 1e-3  # nats between the two


def story_prompts(tokenizer) -> list[list[int]]:
    """The questions of chats that no model has seen, with what comes before the answer."""
    messages = [story_chats.row(c)['messages'][:1] for c in story_chats.held_out(COUNT, seed=1)]
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]


def shipped_prompts(tokenizer) -> list[list[int]]:
    """The same of the held-out chats of SmolLM2."""
    split = data.open_split(str(CHATS), 'validation', vocab_size=len(tokenizer))
    first = [int(np.argmax(np.asarray(split.role[i]) == split.meta['roles']['final'])) for i in range(COUNT)]
    return [np.asarray(split.tokens[i, :n]).tolist() for i, n in enumerate(first)]


@pytest.mark.parametrize(
    ('directory', 'prompts'),
    [(CHAT['llama'], story_prompts), (SMOLLM2, shipped_prompts)],
    ids=['tiny', 'smollm2'],
)
def test_log_probabilities_of_drawn_tokens_are_ours(tmp_path, directory: pathlib.Path, prompts):
    if not directory.exists():
        pytest.skip(f'no {directory}: make smollm2')
    given = prompts(hf.load_tokenizer(directory))
    with served(directory, tmp_path / 'log') as url:
        asked = {'max_tokens': TOKENS, 'ignore_eos': True, 'return_token_ids': True, 'temperature': 0.9, 'logprobs': 0}
        choices = post(url + '/completions', prompt=given, **asked)['choices']
    drawn_NxT = np.array([c['token_ids'] for c in choices])
    theirs_NxT = np.array([c['logprobs']['token_logprobs'] for c in choices])
    assert drawn_NxT.shape == theirs_NxT.shape == (COUNT, TOKENS)
    rows_NxS = np.zeros((COUNT, max(map(len, given)) + TOKENS), np.int32)
    at_NxT = np.array([[len(ids)] for ids in given]) + np.arange(TOKENS)
    for row, ids in zip(rows_NxS, given, strict=True):
        row[: len(ids)] = ids
    np.put_along_axis(rows_NxS, at_NxT, drawn_NxT, 1)
    model, ours_NxT = hf.load_model(directory), []
    for row_1xS, at_T, drawn_T in zip(rows_NxS[:, None], at_NxT, drawn_NxT, strict=True):
        logp_TxV = np.asarray(
            jax.nn.log_softmax(model(row_1xS)[0, at_T - 1])
        )  # a token is drawn where the one before stands
        ours_NxT.append(logp_TxV[np.arange(TOKENS), drawn_T])
    off = np.abs(np.array(ours_NxT) - theirs_NxT)
    print(
        f'{directory.name}: {off.size} drawn tokens, mean {theirs_NxT.mean():.3f} nats; at most {off.max():.1e} apart'
    )
    assert off.max() <= MOST
