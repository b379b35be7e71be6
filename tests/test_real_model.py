"""SmolLM2-135M-Instruct, where `make smollm2` has made it: our forward pass beside that of transformers."""

import pathlib

import numpy as np
import pytest
import torch
import transformers

from lens import data, hf

ROOT = pathlib.Path(__file__).parent.parent
MODEL, CHATS = ROOT / 'data/smollm2/model', ROOT / 'configs/smollm2_chats'
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL.exists(), reason=f'no {MODEL}: make smollm2')]


def test_logits_of_chats_are_those_of_transformers():
    model = hf.load_model(MODEL)
    split = data.open_split(str(CHATS), 'validation', vocab_size=model.config.vocab_size)
    rows = np.flatnonzero(split.lengths >= 128)[:8]
    ids = np.asarray(split.tokens[rows, :128], np.int32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    off, spread = np.abs(np.asarray(model(ids)) - expected).max(), expected.std()
    print(f'logits at most {off:.1e} from transformers, spread {spread:.2f}')
    assert off <= 1e-3 * spread


def test_the_tokenizer_is_the_one_that_the_chats_were_made_with():
    tokenizer = hf.load_tokenizer(MODEL)
    split = data.open_split(str(CHATS), 'validation', vocab_size=len(tokenizer))
    for row in range(8):
        ids = np.asarray(split.tokens[row, : split.lengths[row]]).tolist()
        assert tokenizer(tokenizer.decode(ids))['input_ids'] == ids
