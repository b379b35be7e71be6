"""benchmarks.tpu on the devices of the tests: what it says of a program that is split over them."""

import os

import jax
import pytest

from benchmarks import full_size, tpu

READING = full_size.small(full_size.PARTS['llama_sft'])._replace(work='read')
TENSOR = READING._replace(values={**READING.values, 'mesh.model': 2})


def test_what_a_split_reading_needs_and_sends():
    row = tpu.run(TENSOR, jax.devices(), 1.0)
    assert row['wrong'] == [] and row['given_gb'] > 0 and 0 < row['memory_gb'] < 1.0
    # the sums after attention and MLP of two blocks, and one at the embedding
    assert row['all-reduce'] == 2 * 2 + 1
    documents, tokens, width = 2, full_size.SMALL_LEN, full_size.SMALL['d_model']
    assert row['all-reduce_gb'] >= 5 * documents * tokens * width * 2 * (2 * 1 / 2) / 1e9  # bfloat16, or wider


def test_what_cannot_fit_is_not_compiled(monkeypatch):
    monkeypatch.setattr(full_size, 'programs', lambda *_: pytest.fail('compiled'))
    row = tpu.run(TENSOR, jax.devices(), 1e-6)
    assert row['wrong'] == ['what it is given does not fit in 0.0 GB'] and row['given_gb'] > 1e-6


def test_an_error_and_what_the_compiler_says_are_reported(monkeypatch):
    def programs(*_):
        os.write(2, b'W spmd.cc] Involuntary full rematerialization. op_name="jit(f)/dot" {x}\nW another\n')
        raise ValueError('no such\n  placement')

    monkeypatch.setattr(full_size, 'programs', programs)
    assert tpu.run(TENSOR, jax.devices(), 1.0)['wrong'] == ['no such placement', 'rematerialised: jit(f)/dot']


def test_steps_are_those_of_two_models_in_every_way():
    assert len(tpu.STEPS) == 10
    kind, part = tpu.STEPS['gptoss_grpo_tensor']
    assert (kind, part.values, part.explanations) == ('v5p', {'mesh.model': 8}, 8 * 2 * 8)
