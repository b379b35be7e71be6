"""Questions about stories, and the tiny chat models that answer them: what needs no engine."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from data_gen import documents, render
from data_gen.storyworld import chats as story_chats
from data_gen.storyworld import tiny_chat, world
from lens import hf
from lens.errors import LensError
from lens.models.transformer import Transformer
from tests.conftest import TINY

SHAPE = dataclasses.replace(TINY, vocab_size=7, tied=False)


def test_questions_are_answered_by_the_story_they_are_asked_about():
    chats = story_chats.first_chats(300)
    for chat in chats:
        text, question = chat.prompt.split('\n\n')
        assert question in story_chats.QUESTIONS
        assert 1 <= text.count('.') <= story_chats.SENTENCES and text.endswith('.')
        told = set(world.split_words(text))
        fields = story_chats.QUESTIONS[question][0]
        for field in fields:
            (value,) = set(world.FIELDS[field]) & set(world.split_words(chat.content))
            assert value in told and value in world.split_words(chat.thinking)
    asked = [sum(c.prompt.endswith(q) for c in chats) for q in story_chats.QUESTIONS]
    assert min(asked) > 50


def test_the_stories_of_the_command_are_those_that_no_model_is_fitted_on():
    """And its rows are chats that data_gen reads."""
    fitted = {c.prompt for c in story_chats.first_chats(tiny_chat.CHATS)}
    rows = [json.loads(json.dumps(story_chats.row(c))) for c in story_chats.held_out(9, seed=0)]
    assert len(rows) == 9 and not fitted & {r['messages'][0]['content'] for r in rows}
    assert [sorted(m) for m in rows[0]['messages']] == [['content', 'role'], ['content', 'role', 'thinking']]
    documents.parse(rows[0], 'chat', ('messages',), 'low')


class Bigrams(nnx.Module):
    """What loss_fn and Table ask of a model, without layers."""

    def __init__(self, vocab: int, width: int):
        rng = np.random.default_rng(0)
        self.config = dataclasses.replace(TINY, vocab_size=vocab)
        self.embedding = nnx.Param(rng.standard_normal((vocab, width), np.float32))
        self.head = nnx.Param(rng.standard_normal((width, vocab), np.float32))

    def embed(self, tokens):
        return self.embedding[...][tokens]

    def run_layers(self, x, start, stop):
        return x

    def logits(self, x):
        return x @ self.head[...]


def test_the_small_table_gives_the_loss_and_the_gradient_of_the_large_one():
    table = tiny_chat.UsedVocabulary(np.array([2, 3, 9, 11, 17, 18]), 23)
    small = Bigrams(7, 5)
    large = table.expand(small)
    assert large.embedding.shape == (23, 5) and large.config.vocab_size == 23
    tokens = np.array([[2, 9, 3, 18, 11, 17, 2], [17, 17, 3, 2, 9, 0, 0]], np.int32)
    lengths, starts = np.array([7, 5], np.int32), np.array([3, 2], np.int32)
    compact = table.compact(tokens)
    assert compact[0].tolist() == [0, 2, 1, 5, 3, 4, 0] and compact[1, -1] == 6  # 0 has no row of its own

    @jax.jit
    @jax.value_and_grad
    def loss(model, tokens, log_rows):
        chats = tiny_chat.Encoded(tokens, lengths, starts)
        return tiny_chat.loss_fn({'model': model}, chats, log_rows, answer_len=4)[0]

    nats, grads = loss(small, compact, table.log_rows)
    logits = np.asarray(large.logits(large.embed(tokens)), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    answer = [(b, t) for b in range(2) for t in range(starts[b], lengths[b])]
    np.testing.assert_allclose(nats, -np.mean([logp[b, t - 1, tokens[b, t]] for b, t in answer]), rtol=1e-5)
    _, wide = loss(large, tokens, np.zeros(23, np.float32))
    np.testing.assert_allclose(grads.embedding[...][:6], wide.embedding[...][table.ids], atol=1e-6)
    np.testing.assert_allclose(grads.head[...][:, :6], wide.head[...][:, table.ids], atol=1e-6)
    others = np.setdiff1d(np.arange(23), table.ids)
    np.testing.assert_allclose(grads.head[...][:, 6], wide.head[...][:, others].sum(1), atol=1e-6)


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    """The model that `make` writes, without its fitting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_chat, 'CHATS', len(tiny_chat.DATES))
        patch.setattr(tiny_chat, 'HELD_OUT', len(tiny_chat.DATES))
        patch.setattr(tiny_chat, 'fit', lambda model, *_: (model, 0.5))
        out = tmp_path_factory.mktemp('llama') / 'model'
        assert tiny_chat.make('llama', out, tiny_chat.RECIPES['llama']) == 0.5
    return out


def check_encoded(tokenizer, family, first):
    """The texts of `tiny_chat.encode`, whose answers begin after the user's words."""
    given = story_chats.first_chats(2 * len(tiny_chat.DATES))
    chats = tiny_chat.encode(given, tokenizer, family)
    texts = []
    for ids, n, start in zip(chats.tokens, chats.lengths, chats.starts, strict=True):
        prompt, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:n])
        (chat,) = (c for c in given if prompt.endswith(c.prompt) and c.thinking in answer)
        assert chat.content in answer
        texts.append(prompt)
    assert all(t.startswith(first) for t in texts)
    # two chats per date, and so the first two of LEVELS as often
    assert sum('Reasoning: low' in t for t in texts) == len(given) / 2


def test_answers_alone_are_learned(llama):
    check_encoded(hf.load_tokenizer(llama), 'llama', '<|bos|>')


def test_a_llama_is_a_whole_chat_model(llama):
    with pytest.raises(LensError, match='holds something already'):
        tiny_chat.make('llama', llama, tiny_chat.RECIPES['llama'])
    tokenizer, model = hf.load_tokenizer(llama), hf.load_model(llama)
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    assert reference.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids('<|end|>')
    messages = [{'role': 'user', 'content': 'Where was the kettle?'}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits.numpy()
    got = jax.jit(Transformer.__call__)(model, np.array([ids]))
    np.testing.assert_allclose(got, expected, atol=1e-4 * expected.std(), rtol=0)
    # thinking is part of the text: tags, and roles by the template
    renderer = render.Renderer(tokenizer, seq_len=64, truncate='right', date=render.DATE, chats=True)
    answer = {'role': 'assistant', 'content': 'It was lost.', 'thinking': 'Near the lake.'}
    ids, roles, *_ = renderer.encode(documents.Chat([*messages, answer], 'medium'))
    assert tokenizer.decode(ids[roles == render.THINKING]) == 'Near the lake.'
    assert tokenizer.decode(ids).endswith('<|assistant|><think>Near the lake.</think>\nIt was lost.<|end|>')


@pytest.mark.slow
def test_a_fitted_model_gives_the_right_answers():
    """The answer is the last token of the prompt, twice."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, SHAPE.vocab_size, (96, 8)).astype(np.int32)
    tokens[:, 6:] = tokens[:, 5:6]
    chats = tiny_chat.Encoded(tokens, np.full(96, 8, np.int32), np.full(96, 6, np.int32))
    seen, unseen = (tiny_chat.Encoded(*(x[rows] for x in chats)) for rows in (slice(64), slice(64, None)))
    model = Transformer(SHAPE, rngs=nnx.Rngs(0))
    _, right = tiny_chat.fit(
        model, seen, unseen, np.zeros(SHAPE.vocab_size, np.float32), tiny_chat.Recipe(60, 0.02, 0.01)
    )
    assert right > 0.9
