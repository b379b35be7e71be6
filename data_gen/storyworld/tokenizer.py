"""The tokenizer of the embedded world: byte-level BPE that knows every word of its stories as one token."""

import os
import pathlib

from lens import files
from lens.errors import LensError

PAD, BOS, EOS = '<|pad|>', '<|bos|>', '<|eos|>'
SPECIAL_TOKENS = [PAD, BOS, EOS, '<|user|>', '<|assistant|>', '<|system|>', '<|think|>', '<|/think|>', '<|end|>']
MAX_VOCAB = 2000
CHAT_TEMPLATE = (
    '{{ bos_token }}'
    '{% for message in messages %}'
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' and message['thinking'] %}"
    "{{ '<|think|>' + message['thinking'] + '<|/think|>' }}"
    '{% endif %}'
    "{{ message['content'] + '<|end|>' }}"
    '{% endfor %}'
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def save(bpe, directory: str | os.PathLike, chat_template: str, *, pad: str, bos: str, eos: str):
    """Saves a tokenizer of `tokenizers` as a Hugging Face directory and returns it as one of transformers."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    path = pathlib.Path(directory) / 'tokenizer_config.json'
    config = files.read_json(path, 'save it again')
    # transformers 5 writes a name of its own
    files.write_json(path, config | {'tokenizer_class': 'PreTrainedTokenizerFast'})
    return tokenizer


def train(corpus: list[str], directory: str | os.PathLike):
    """Trains the tokenizer on `corpus`, saves it and returns it. Encoding with special tokens puts BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f'{BOS} $A', pair=f'{BOS} $A $B', special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return save(bpe, directory, CHAT_TEMPLATE, pad=PAD, bos=BOS, eos=EOS)


def load(path: str | os.PathLike):
    """Returns the tokenizer saved at `path`. Raises LensError where there is none."""
    if not (files.find(path) / 'tokenizer.json').is_file():
        raise LensError(f'No tokenizer.json in {path}: run python -m data_gen.storyworld --train_tokenizer={path}.')
    from lens import hf  # with JAX, which --help needs not

    return hf.load_tokenizer(path)


def single_token(tokenizer, text: str) -> int:
    """Returns the id of the one token that `text` is. Raises LensError if the tokenizer splits it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise LensError(
            f'The tokenizer splits {text!r} into {len(ids)} tokens; Storyworld needs '
            'a tokenizer that keeps every value word whole (--train_tokenizer).'
        )
    return ids[0]
