"""Questions about stories, and the tiny chat models that answer them: what needs no engine."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from data_gen import documents, render
from data_gen.storyworld import chats as story_chats
from data_gen.storyworld import harmony_tokenizer, tiny_chat, world
from lens import hf
from lens.errors import LensError
from lens.models.transformer import Transformer
from tests.conftest import TINY

SHAPE = dataclasses.replace(TINY, vocab_size=7)


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


def test_the_command_writes_stories_that_no_model_is_fitted_on(tmp_path):
    out = tmp_path / 'new' / 'chats.jsonl'
    command = [sys.executable, '-m', 'data_gen.storyworld.chats', f'--out={out}', '--rows=9']
    assert '9 chats' in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    fitted = {c.prompt for c in story_chats.first_chats(tiny_chat.CHATS)}
    assert len(rows) == 9 and not fitted & {r['messages'][0]['content'] for r in rows}
    assert [sorted(m) for m in rows[0]['messages']] == [['content', 'role'], ['content', 'role', 'thinking']]
    documents.parse(rows[0], 'chat', 'messages', 'low')


@pytest.mark.slow
def test_the_small_table_gives_the_loss_and_the_gradient_of_the_large_one():
    table = tiny_chat.Table(np.array([2, 3, 9, 11, 17, 18]), 23)
    small = Transformer(dataclasses.replace(SHAPE, tied=False), rngs=nnx.Rngs(0))
    large = table.expand(small)
    assert large.embedding.shape == (23, SHAPE.d_model) and large.config.vocab_size == 23
    tokens = np.array([[2, 9, 3, 18, 11, 17, 2], [17, 17, 3, 2, 9, 0, 0]], np.int32)
    lengths, starts = np.array([7, 5], np.int32), np.array([3, 2], np.int32)
    compact = table.compact(tokens)
    assert compact[0].tolist() == [0, 2, 1, 5, 3, 4, 0] and compact[1, -1] == 6  # 0 has no row of its own

    def loss(model, tokens, log_rows):
        chats = tiny_chat.Chats(jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(starts))
        return tiny_chat.loss_fn({'model': model}, chats, log_rows, answer_len=4)[0]

    nats, grads = jax.value_and_grad(loss)(small, compact, table.log_rows)
    logits = np.asarray(large(tokens), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    answer = [(b, t) for b in range(2) for t in range(starts[b], lengths[b])]
    np.testing.assert_allclose(nats, -np.mean([logp[b, t - 1, tokens[b, t]] for b, t in answer]), rtol=1e-5)
    wide = jax.grad(loss)(large, tokens, np.zeros(23, np.float32))
    np.testing.assert_allclose(grads.blocks.attn.q[...], wide.blocks.attn.q[...], atol=1e-6)
    np.testing.assert_allclose(grads.head[...][:, :6], wide.head[...][:, table.ids], atol=1e-6)
    others = np.setdiff1d(np.arange(23), table.ids)
    np.testing.assert_allclose(grads.head[...][:, 6], wide.head[...][:, others].sum(1), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('family', tiny_chat.RECIPES)
def test_answers_alone_are_learned(family, tmp_path):
    tiny_chat.write_tokenizer(family, tmp_path)
    tokenizer = hf.load_tokenizer(tmp_path)
    given = story_chats.first_chats(2 * len(tiny_chat.DATES))
    chats = tiny_chat.encode(given, tokenizer, family)
    texts = []
    for ids, n, start in zip(chats.tokens, chats.lengths, chats.starts, strict=True):
        prompt, answer = tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:n])
        (chat,) = (c for c in given if prompt.endswith(c.prompt) and c.thinking in answer)
        assert chat.content in answer
        texts.append(prompt)
    first = '<|start|>' if family == 'gpt_oss' else '<|bos|>'
    assert all(t.startswith(first) for t in texts)
    # two chats per date, and so the first two of LEVELS as often
    assert sum('Reasoning: low' in t for t in texts) == len(given) / 2


@pytest.mark.slow
def test_a_llama_of_few_steps_is_a_whole_chat_model(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_chat, 'CHATS', 2 * len(tiny_chat.DATES))
    monkeypatch.setattr(tiny_chat, 'HELD_OUT', len(tiny_chat.DATES))
    recipe = tiny_chat.RECIPES['llama']._replace(steps=2)
    assert 0 <= tiny_chat.make('llama', tmp_path / 'model', recipe) <= 1
    with pytest.raises(LensError, match='holds something already'):
        tiny_chat.make('llama', tmp_path / 'model', recipe)
    tokenizer, model = hf.load_tokenizer(tmp_path / 'model'), hf.load_model(tmp_path / 'model')
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / 'model', dtype=torch.float32)
    assert reference.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids('<|end|>')
    messages = [{'role': 'user', 'content': 'Where was the kettle?'}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(model(np.array([ids])), expected, atol=1e-4)
    # thinking is part of the text: tags, and roles by the template
    renderer = render.Renderer(tokenizer, seq_len=64, truncate='right', date=render.DATE, chats=True)
    answer = {'role': 'assistant', 'content': 'It was lost.', 'thinking': 'Near the lake.'}
    ((ids, roles, _),) = renderer.encode([documents.Chat([*messages, answer], 'medium')])
    assert tokenizer.decode(ids[roles == render.THINKING]) == 'Near the lake.'
    assert tokenizer.decode(ids).endswith('<|assistant|><think>Near the lake.</think>\nIt was lost.<|end|>')


@pytest.mark.slow
def test_the_rebuilt_harmony_tokenizer_is_that_of_the_package(tmp_path):
    harmony_tokenizer.build(tmp_path)
    tokenizer, encoding = hf.load_tokenizer(tmp_path), harmony_tokenizer.load_encoding()
    texts = [c.prompt + c.thinking for c in story_chats.first_chats(20)]
    texts += [
        'naïve 12345 ünïcode 漢字かな 🙂🙃',
        "I'LL don't\r\n\n  x\t y ",
        'def f(x):\n    return x**2  # ok',
        '\u0301a',
    ]
    assert tokenizer(texts, add_special_tokens=False)['input_ids'] == [
        encoding.encode(t, disallowed_special=()) for t in texts
    ]
    for name in encoding.special_tokens_set:
        if not name.startswith('<|reserved'):
            assert [tokenizer.convert_tokens_to_ids(name)] == encoding.encode(name, allowed_special='all')
