"""Explanations for the SFT warm-up: python -m data_gen.label --data=data/mine --tokenizer=MODEL_DIR --method=self

Every document of the folder is cut at --positions sampled positions (label_prompts says by which rule). With
--method=self the label of each is made of the text and the subject, in minutes and without a server:
`topic: volcano, ash, magma | next: destroys the slope | now: flows down the`. --parts says which parts in which order, and
how many words each has at most: words are taken off until a label has --explanation_len tokens, and the last words grow
into the room that is left. Topic words are rare ones, or with --layer those that the subject's activations after that
block still hold, as far as a linear probe tells: a label of the others is noise, which no decoder learns to read. What
comes next (--next) is taken from the text where it is an answer of a chat, which the subject is taken to have written, and
elsewhere asked of the subject. meta.json keeps the format as label_parts.

With --method=server an OpenAI-compatible server, local or paid, that serves --model is asked for 2-3 features of the text
up to there. Answers stream to
DATA-labels/labels.jsonl, those without a label to failures.jsonl; a command that was stopped, in whatever way,
goes on when it is given again. --dry_run prints three prompts and what all would cost, and sends nothing.

The result is positions.npy [N, V] and explanations.npy [N, V, T] as objectives.sft reads them, T =
--explanation_len of the training configuration. Longer labels are cut at T tokens; shorter ones are filled with
pad_id of meta.json, which the decoder so learns to write where a text has ended: every token counts there.
Where responses have a closing tag, that takes the place of the filling; meta.json names the token as filler_id.
Without --out they are added to the splits of DATA, in which every document must then have a label. --out makes
a new folder that leaves out the documents without one.

The ledger counts the tokens that the server reports. A request is sent only while its price cannot exceed
--max_cost: no prompt has more tokens than bytes. Answers that were lost on their way are not counted.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import pathlib

from lens.errors import LensError, need_package

from . import chat_data, journal, label_files, label_prompts, label_self, requests
from .ledger import Ledger
from .options import command, need, option
from .requests import LOCAL, Request
from .servers import Answer, Failed, Servers

TEMPLATE_TOKENS = 256  # most that the chat template of a server adds to a prompt
USELESS = 20  # answers and refusals without a single label, after which a command stops
REASON_CHARS, SAID_CHARS = 200, 2000  # of an answer without a label that are kept
SHOWN = 3  # prompts of a dry run
ANSWER_TOKENS_PER_WORD, ANSWER_TOKENS = 1.4, 16  # of an answer before there is one


@dataclasses.dataclass(frozen=True)
class LabelOptions:
    data: str = option('', 'Folder that data_gen.pretokenize wrote.')
    tokenizer: str = option('', 'Directory or Hub id of the subject, whose tokenizer made the data.')
    out: str = option('', 'New folder with the labelled documents alone; empty: the arrays go into --data.')
    labels: str = option('', 'Folder for labels.jsonl and failures.jsonl; DATA-labels where not given.')
    method: str = option(
        'server', 'Who writes them: a server, or the text and the subject.', choices=('server', 'self')
    )
    splits: str = option('train,validation', 'Splits that get labels.')
    max_documents: int = option(0, 'Only the first documents of each split; 0: all.', 0)
    positions: int = option(10, 'Positions of each document.', 1)
    min_position: int = option(50, 'First position that may be sampled.', 0)
    seed: int = option(42, 'Of the positions.', 0)
    explanation_len: int = option(16, 'Tokens of an explanation, as in the training configuration.', 1, 1 << 16)
    parts: str = option('topic:4,next:4,now:4', 'Parts of a label of --method=self, in order, and most words of each.')
    bare: bool = option(False, 'Labels of --method=self have no names of parts and no commas.')
    context_tokens: int = option(0, 'Last tokens of the source whose words are no topic: encoder.context_tokens.', 0)
    layer: int = option(-1, 'Block whose activations choose the topic words of --method=self; -1: rarity does.', -1)
    next: str = option('auto', 'Where --method=self has what comes next from.', choices=label_self.NEXT)
    words: int = option(0, 'Words that the instruction allows; 0: what fits into --explanation_len.', 0)
    instruction: str = option('', 'File with another instruction; it holds {text} and may hold {words}.')
    server_urls: str = option(LOCAL, 'Servers, separated by commas.')
    model: str = option('', 'Name of the served model that writes the labels.')
    api_key_env: str = option('', 'Environment variable that holds the API key, for servers that want one.')
    temperature: float = option(1.0, 'Of sampling.', 0)
    max_tokens: int = option(300, 'Most tokens of an answer, its thinking included.', 1)
    attempts: int = option(2, 'Answers asked for until one holds a label.', 1)
    max_concurrency: int = option(8, 'Requests at a time.', 1)
    timeout: float = option(120.0, 'Seconds for one request.', 0.1)
    price_in: float = option(0.0, 'Price of a million prompt tokens.', 0)
    price_out: float = option(0.0, 'Price of a million answer tokens.', 0)
    max_cost: float = option(0.0, 'Stop before this is exceeded, earlier commands included; 0: no limit.', 0)
    dry_run: bool = option(False, 'Print three prompts and an estimate; send and write nothing.')
    finish: bool = option(False, 'Send nothing, make the arrays from the labels that are there.')
    retry_failures: bool = option(False, 'Ask again where an earlier command got no label.')
    force: bool = option(False, 'Replace given explanations or a folder that this command did not make.')


class Documents:
    """The documents that get labels, and where those go. Raises LensError before anything is written."""

    def __init__(self, o: LabelOptions):
        self.o, self.data = o, pathlib.Path(o.data)
        self.out = pathlib.Path(o.out) if o.out else None
        names = [n.strip() for n in o.splits.split(',') if n.strip()]
        if not names or len(set(names)) < len(names) or set(names) - {'train', 'validation'}:
            raise LensError(f'--splits={o.splits!r} is not train, validation or train,validation.')
        from lens import hf  # with JAX, which --help needs not

        self.tokenizer = hf.load_tokenizer(o.tokenizer)
        drawn = {'seed': o.seed, 'count': o.positions, 'min_position': o.min_position, 'rows': o.max_documents}
        self.parts = [label_prompts.open_part(o.data, n, self.tokenizer, **drawn) for n in names]
        for part in self.parts:
            self._check(part, hf.tokenizer_sha256(o.tokenizer))
        self._check_places()

    def _check(self, part: label_prompts.Part, tokenizer_sha256: str) -> None:
        folder = part.split.directory
        if part.split.meta.get('tokenizer_sha256') not in (None, tokenizer_sha256):
            raise LensError(f'{folder} was made with another tokenizer than that of {self.o.tokenizer}: give that one.')
        without = int((part.positions < 0).all(1).sum())
        if without == len(part.split):
            raise LensError(f'{folder} has no document with a token from position {self.o.min_position} on.')
        if self.out:
            return
        if without:
            raise LensError(
                f'{folder} has {without} documents that get no label (shorter than --min_position, or beyond '
                '--max_documents): give --out=FOLDER for a copy without them.'
            )
        if (folder / 'positions.npy').exists() and not (folder / label_files.MADE).exists() and not self.o.force:
            raise LensError(
                f'{folder}/positions.npy exists and was not made by this command: --force replaces it, --out=FOLDER '
                'leaves it.'
            )

    def _check_places(self) -> None:
        labels = sum(p.positions.size for p in self.parts)
        if not self.out:
            for part in self.parts:
                journal.check_folder(part.split.directory, 4 * part.positions.size * (self.o.explanation_len + 1))
            return
        if self.out.resolve() == self.data.resolve():
            raise LensError('--out is --data: leave --out away to add the arrays there.')
        if self.out.exists() and not any((self.out / p.name / 'meta.json').exists() for p in self.parts):
            raise LensError(f'{self.out} exists and is no folder of tokens: choose another --out.')
        made = all((self.out / p.name / label_files.MADE).exists() for p in self.parts)
        if self.out.exists() and not made and not self.o.force:
            raise LensError(f'{self.out} exists and was not made by this command: --force replaces it.')
        journal.check_folder(self.out.parent, 4 * labels * (self.o.explanation_len + 1))

    def write(self, labels, again: str) -> str:
        """Makes the arrays; returns where they are. again: what goes on after an error. Raises LensError."""
        labelled = {p.name: labels.labelled(p) for p in self.parts}
        try:
            if self.out:
                counts = label_files.write_folder(self.out, self.data, self.parts, labels)
            else:
                counts = {p.name: label_files.write_in_place(p, labels) for p in self.parts}
        except OSError as e:
            raise journal.cannot_write(self.out or self.data, e, again) from None
        total = {k: sum(c[k] for c in counts.values()) for k in ('labels', 'cut', 'filled_tokens')}
        filled = total['filled_tokens'] / (total['labels'] * self.o.explanation_len)
        documents = ', '.join(f'{int(x.any(1).sum())} of {len(x)} {name}' for name, x in labelled.items())
        return (
            f'{total["labels"]} labels of {self.o.explanation_len} tokens: {total["cut"]} were cut to that, '
            f'{filled:.0%} of the tokens are filling.{labels.remark()}\n'
            f'{self.out or self.data}: {documents} documents have labels'
        )


class Labelling(Documents):
    """The documents of a command and its requests.Work. Raises LensError before anything is written."""

    unit = 'labels'

    def __init__(self, o: LabelOptions):
        if o.max_cost and not (o.price_in or o.price_out):
            raise LensError('--max_cost needs the prices: give --price_in and --price_out.')
        self.folder = pathlib.Path(o.labels or f'{o.data.rstrip("/")}-labels')
        self.template = label_prompts.instruction(_instruction(o.instruction), o.explanation_len, o.words)
        super().__init__(o)
        journal.check_folder(self.folder, 1000 * sum(p.positions.size for p in self.parts))
        self.made = {k: getattr(o, k) for k in ('seed', 'positions', 'min_position', 'model', 'temperature')}
        self.made['instruction'] = self.template
        self.journal = Ledger(self.folder, self.parts, {'data': self._fingerprint()} | self.made, o)
        self.total = sum(int((p.positions >= 0).sum()) for p in self.parts)
        self._jobs, self._useless = self.jobs(), 0

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f'{part.name} {part.split.meta.get("tokenizer_sha256")} {len(part.split)}'.encode())
            for x in (part.split.doc_id, part.split.lengths, part.split.tokens[0]):
                digest.update(x.tobytes())
        return digest.hexdigest()

    def jobs(self):
        """Yields the labels that are to be made, document by document."""
        for part in self.parts:
            wanted = self.journal.wanted(part)
            for row in wanted.any(1).nonzero()[0]:
                for slot in wanted[row].nonzero()[0]:
                    place = {'split': part.name, 'row': int(row), 'slot': int(slot)}
                    yield place | {'doc_id': int(part.split.doc_id[row]), 'position': int(part.positions[row, slot])}

    def prompt(self, job: dict) -> str:
        part = next(p for p in self.parts if p.name == job['split'])
        return self.template.replace('{text}', part.text(job['row'], job['position'], self.tokenizer))

    def estimate(self) -> tuple[int, int, int]:
        """Estimates (calls, prompt tokens, answer tokens) of what is to be made, by the tokenizer of the subject."""
        overhead = len(self.tokenizer(self.template)['input_ids'])
        wanted = [(p, self.journal.wanted(p)) for p in self.parts]
        calls = sum(int(w.sum()) for _, w in wanted)
        prompt = calls * overhead + sum(int((p.positions[w] + 1).sum()) for p, w in wanted)
        words = label_prompts.words_allowed(self.o.words, self.o.explanation_len)
        each = min(int(words * ANSWER_TOKENS_PER_WORD) + ANSWER_TOKENS, self.o.max_tokens)
        return calls, prompt, calls * each

    def dry_run(self) -> str:
        documents = (next(jobs) for _, jobs in itertools.groupby(self.jobs(), lambda j: (j['split'], j['row'])))
        for i, job in enumerate(itertools.islice(documents, SHOWN), 1):
            print(f'--- prompt {i}: {job["split"]} document {job["doc_id"]}, position {job["position"]}')
            print(f'{self.prompt(job)}\n')
        calls, prompt, answer = self.estimate()
        likely, most = self.journal.price(prompt, answer), self.journal.price(prompt, calls * self.o.max_tokens)
        cost = f'{likely:.2f}, with --max_tokens for every answer {most:.2f}' if most else 'unknown (no prices)'
        return (
            f'Estimate: {calls:,} calls, {prompt:,} prompt tokens, {answer:,} answer tokens (counted with the '
            f'tokenizer of the subject), cost {cost}. So far: {self.journal.spent()}. Nothing was sent.'
        )

    def next(self) -> Request | None:
        job, o = next(self._jobs, requests.END), self.o
        if job is requests.END:
            return job
        prompt = self.prompt(job)
        body = {'model': o.model, 'messages': [{'role': 'user', 'content': prompt}]}
        most = self.journal.price(len(prompt.encode()) + TEMPLATE_TOKENS, o.max_tokens)
        return Request(job, body | {'max_tokens': o.max_tokens, 'temperature': o.temperature}, most)

    def take(self, request: Request, answer: Answer) -> bool:
        usage = self._usage(request.body['messages'][0]['content'], answer)
        answer.server.add_tokens(usage['answer_tokens'])
        try:
            text = label_prompts.parse(answer.message, answer.finish_reason)
        except label_prompts.BadAnswer as e:
            content = answer.message.get('content')
            usage['content'] = (content if isinstance(content, str) else answer.raw)[:SAID_CHARS]
            return self._fail(request.job, 'answer', str(e), usage)
        return self.journal.add('labels', request.job, {'text': text} | usage)

    def _usage(self, prompt: str, answer: Answer) -> dict:
        """What the server says that the answer has used; without that, by the tokenizer of the subject."""
        if answer.prompt_tokens is not None and answer.tokens is not None:
            return {'prompt_tokens': answer.prompt_tokens, 'answer_tokens': answer.tokens}
        said = ' '.join(v for k, v in answer.message.items() if isinstance(v, str) and k != 'role')  # and thinking
        prompt_tokens, tokens = (len(self.tokenizer(t)['input_ids']) for t in (prompt, chat_data.clean(said)))
        return {'prompt_tokens': prompt_tokens, 'answer_tokens': tokens, 'estimated': True}

    def give_up(self, request: Request, attempts: int, e: Failed) -> None:
        self._fail(request.job, 'refused' if e.refused else 'failed', str(e), {})

    def _fail(self, job: dict, kind: str, reason: str, usage: dict) -> bool:
        """Notes an answer without a label, or that there is none. Raises LensError where nothing so far was a label."""
        closed = self.journal.add('failures', job, {'kind': kind, 'reason': reason[:REASON_CHARS]} | usage)
        self._useless += kind != 'failed'
        if not self.journal.counts['data'] and self._useless >= max(USELESS, self.o.max_concurrency):
            raise LensError(
                f'{self._useless} answers and not one label ({self.journal.why()}; {self.journal.spent()}): mend --model, '
                '--max_tokens or --instruction, then add --retry_failures.'
            )
        return closed

    def progress(self) -> str:
        return f'{self.journal.counts["data"]} labels ({self.journal.spent()})'

    def finish(self) -> str:
        """Makes the arrays of the answers; returns where they are. Raises LensError."""
        if not (log := self.journal.paths['labels']).exists():
            raise LensError(f'{log} does not exist: there are no labels yet, leave --finish away.')
        self.journal.open()
        for part in self.parts:
            missing = int((~self.journal.labelled(part).any(1)).sum())
            if missing == len(part.split):
                raise LensError(f'No document of {part.split.directory} has a label: {self.journal.why()}.')
            if missing and not self.out:
                raise LensError(
                    f'{missing} documents of {part.split.directory} have no label ({self.journal.why()}): give --out=FOLDER '
                    'for a copy without them, or --retry_failures.'
                )
        made = self.made | {'explanation_len': self.o.explanation_len, 'without_label': self.journal.reasons()}
        made['ledger'] = self.journal.as_dict()
        labels = label_files.Labels(self.journal, self.tokenizer, self.o.explanation_len, made, {})
        return self.write(labels, self.journal.again)


def _instruction(path: str) -> str:
    try:
        return pathlib.Path(path).read_text('utf-8') if path else label_prompts.INSTRUCTION
    except (OSError, UnicodeDecodeError) as e:
        raise LensError(f'--instruction={path} cannot be read ({getattr(e, "strerror", None) or e}).') from None


def label(o: LabelOptions) -> str:
    """Runs to the end; the last line says where the result is. Raises LensError."""
    if o.method == 'self':
        need(o, 'data', 'tokenizer')
        form = label_self.form(o)
        documents = Documents(o)
        return documents.write(label_self.make(documents.parts, documents.tokenizer, form, o), 'the same command')
    need(o, 'data', 'tokenizer', 'model')
    asks = not (o.dry_run or o.finish)
    if asks:
        need_package('aiohttp', 'datagen', 'Asking servers')
    key = requests.api_key(o.api_key_env) if asks else None
    work = Labelling(o)
    if o.dry_run:
        return work.dry_run()
    with contextlib.closing(work.journal):
        if not o.finish and work.estimate()[0]:
            servers = Servers(o.server_urls, o.model, o.timeout, key=key)
            requests.Engine(work, servers, o.max_concurrency, o.max_cost).run()
        return work.finish()


def main() -> None:
    command(LabelOptions, label)


if __name__ == '__main__':
    main()
