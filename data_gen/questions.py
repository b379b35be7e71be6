"""User turns for a chat model to answer: python -m data_gen.questions --rows=20000 --out=data/questions.jsonl

Every line is {"messages": [{"role": "user", "content": …}]}, as data_gen.generate reads it; no two are equal. A question
is a form (explain, story, list, compare, …) about a topic, in one of its wordings, with or without a style and a length.
Forms and topics come in turn: any stretch of rows has all of them about equally often, whatever --rows says.

The whole chain, with the subject itself as the author of the answers (2 cores: 1,500 chats in half an hour; a GPU: all):

    make vllm-env smollm2
    python -m data_gen.questions --rows=1500 --out=data/smollm2/questions.jsonl
    VLLM_ARGS='--dtype bfloat16 --max-num-seqs 64 --max-model-len 1024' \\
      PRETOKENIZE_ARGS='--seq_len=208 --validation_fraction=0.25' launch/generate_local.sh data/smollm2/model \\
      --input_dataset=data/smollm2/questions.jsonl --output_path=data/smollm2/chats --reasoning_level= \\
      --temperature=0.9 --top_p=1 --max_completion_tokens=140 --target_total_tokens=1000 --max_concurrency=64 --timeout=900

--rows=20000 is the full size. A model that thinks gets its level back (--reasoning_level=high) and more tokens.
"""

import dataclasses
import itertools
import pathlib
import random
from collections.abc import Iterator

from lens import files
from lens.errors import LensError, shown

from . import question_parts
from .options import command, need, option
from .question_parts import FORMS

PARTS = {
    name: {k: tuple(text.split('; ')) for k, text in getattr(question_parts, name).items()}
    for name in ('TOPICS', 'SLOTS', 'STYLES', 'LENGTHS')
}
OPENINGS = question_parts.OPENINGS.split('; ')
MOST = 10**6  # rows; they are in memory
STYLED, LIMITED, OPENED = 0.4, 0.4, 0.12  # shares of questions with a style, a length, an opening
TRIES = 50  # draws of a question about a topic in a form before it is passed over
LONGEST_TOPIC = 200  # characters


@dataclasses.dataclass(frozen=True)
class QuestionOptions:
    out: str = option('', 'File of JSON lines.')
    rows: int = option(1500, 'Questions.', 1, MOST)
    topics: str = option('', 'Text file with a topic per line, as it stands after "about", in place of our own.')
    seed: int = option(0, 'Of the choice.', 0)


def fields(path: str = '') -> list[list[str]]:
    """Returns the topics by field, our own or those of a file, which are one field. Raises LensError."""
    if not path:
        return [list(topics) for topics in PARTS['TOPICS'].values()]
    try:
        lines = pathlib.Path(path).read_text('utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise LensError(f'{path} cannot be read ({shown(e)}): name a text file with a topic per line.') from None
    topics = list(dict.fromkeys(' '.join(line.split()) for line in lines if line.strip()))
    if len(topics) < 2:
        raise LensError(f'{path} has {len(topics)} topics, and at least two are compared: give one per line.')
    if long := next((t for t in topics if len(t) > LONGEST_TOPIC), None):
        raise LensError(f'{path} has a topic of {len(long)} characters, at most {LONGEST_TOPIC} may be: {shown(long)}')
    return [topics]


def forms_of(topic: str) -> list[str]:
    """Returns the names of the forms that fit a topic: all, or those that ask for nothing to do."""
    doing = topic.split()[0].endswith('ing')
    return [name for name, form in FORMS.items() if doing or not form.doing]


def ask(form: str, topic: str, others: list[str], rng: random.Random) -> str:
    """Returns a question. others: topics of the same field."""
    tone, wordings, _ = FORMS[form]
    slots = {name: rng.choice(values) for name, values in PARTS['SLOTS'].items()}
    slots['other_who'] = rng.choice([x for x in PARTS['SLOTS']['who'] if x != slots['who']])
    said = rng.choice(wordings).format(t=topic, o=rng.choice([x for x in others if x != topic]), **slots)
    parts = [said]
    if rng.random() < STYLED:
        parts.append(rng.choice(PARTS['STYLES'][tone]))
    if rng.random() < LIMITED:
        parts.append(rng.choice(PARTS['LENGTHS'][tone]))
    if rng.random() < OPENED:
        parts.insert(0, rng.choice(OPENINGS))
    return ' '.join(parts)


def passes(by_field: list[list[str]], rng: random.Random) -> Iterator[list[tuple[str, str, list[str]]]]:
    """Yields without end, of every topic in a new order: a form, the topic, its field. A topic has had each of its forms
    before one returns, and the forms of a pass are about equally many."""
    rows = [(topic, field) for field in by_field for topic in field]
    rng.shuffle(rows)
    forms = rng.sample(list(FORMS), len(FORMS))
    for turn in itertools.count():
        chosen = []
        for i, (topic, field) in enumerate(rows):
            fitting = [f for f in forms if f in forms_of(topic)]
            chosen.append((fitting[(i + turn) % len(fitting)], topic, field))
        yield rng.sample(chosen, len(chosen))


def questions(rows: int, seed: int = 0, topics: str = '') -> list[str]:
    """Returns `rows` different questions. Raises LensError where the topics give no more of them."""
    rng, said = random.Random(seed), {}
    without = 0  # passes that gave nothing new
    for chosen in passes(fields(topics), rng):
        before = len(said)
        for form, topic, field in chosen:
            new = (q for _ in range(TRIES) if (q := ask(form, topic, field, rng)) not in said)
            if (question := next(new, None)) is not None:
                said[question] = None
            if len(said) == rows:
                return list(said)
        without = 0 if len(said) > before else without + 1
        if without == len(FORMS):
            raise LensError(
                f'--rows={rows}: {len(said)} questions are all that {topics or "our topics"} gave: add topics.'
            )


def write(o: QuestionOptions) -> str:
    """Writes the file; returns what it holds. Raises LensError."""
    need(o, 'out')
    said, path = questions(o.rows, o.seed, o.topics), pathlib.Path(o.out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_jsonl(path, ({'messages': [{'role': 'user', 'content': q}]} for q in said))
    except OSError as e:
        raise LensError(f'{path} cannot be written ({e.strerror}): name another --out.') from None
    return f'{len(said)} questions, the first: {said[0]}\n{path}'


def main() -> None:
    command(QuestionOptions, write)


if __name__ == '__main__':
    main()
