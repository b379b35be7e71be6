"""Labelling: what was answered so far, what it cost, and the requests for the rest.

labels.jsonl and failures.jsonl get a line for every answer at the moment it arrives, with its tokens and its
cost; the ledger is the sum over those lines, so a kill loses no more than what was on its way.
"""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import pathlib
import signal

import numpy as np

from data_gen import chat_data, generate, label_files, label_prompts
from data_gen.servers import Answer, Failed, Refused, Servers
from lens.errors import LensError

KINDS = ('labels', 'failures')
TEMPLATE_TOKENS = 256  # most that the chat template of a server adds to a prompt
PAUSE_S = 0.5  # after a request without an answer
ASK_AGAIN_S = 5.0  # for servers that were away at the start
USELESS = 20  # answers and refusals without a single label, after which a command stops
REASON_CHARS, SAID_CHARS = 200, 2000  # of an answer without a label that are kept
WITHOUT = 'without a label'


@dataclasses.dataclass(frozen=True)
class Job:
    """One label: of row `row` of a split, at the position in column `slot`."""

    part: label_prompts.Part
    row: int
    slot: int

    @property
    def position(self) -> int:
        return int(self.part.positions[self.row, self.slot])

    @property
    def doc_id(self) -> int:
        return int(self.part.split.doc_id[self.row])

    def record(self) -> dict:
        place = {'split': self.part.name, 'row': self.row, 'slot': self.slot}
        return place | {'doc_id': self.doc_id, 'position': self.position}


@dataclasses.dataclass
class Failure:
    """Of a job without a label: answers that held none, whether a server refused it, and the last reason."""

    answers: int = 0
    refused: bool = False
    reason: str = ''


class Tally:
    """The two files and what they say. o: label.Options. Raises LensError.

    counts: jobs that are done, as generate.Display shows them.
    """

    def __init__(self, parts: list[label_prompts.Part], folder: pathlib.Path, o):
        self._parts, self._o = {p.name: p for p in parts}, o
        self.paths = {k: folder / f'{k}.jsonl' for k in KINDS}
        self.folder, self._logs = folder, {}
        self._read()

    def _read(self) -> None:
        self._labelled = {n: np.zeros(p.positions.shape, bool) for n, p in self._parts.items()}
        self._failures: dict[tuple, Failure] = {}
        self.answers = self.prompt_tokens = self.answer_tokens = self.estimated = 0
        self.cost = 0.0
        self.counts = {'data': 0, WITHOUT: 0}
        for kind, path in self.paths.items():
            for number, record in enumerate(label_files.records(path), 1):
                try:
                    self._note(kind, record)
                except (KeyError, IndexError, TypeError):
                    raise LensError(
                        f'{path} is damaged (record {number} is none of this command): remove that line, or choose '
                        'another --labels.'
                    ) from None
        if self._o.retry_failures:
            self._failures.clear()
        self.counts[WITHOUT] = sum(map(self._closed, self._failures.values()))

    def _note(self, kind: str, record: dict) -> None:
        name, row, slot = place = record['split'], record['row'], record['slot']
        had = self._labelled[name][row, slot]
        self.prompt_tokens += record['prompt_tokens']
        self.answer_tokens += record['answer_tokens']
        self.cost += record['cost']
        self.answers += record.get('kind', 'answer') == 'answer'
        self.estimated += record.get('estimated', False)
        if kind == 'labels':
            self._labelled[name][row, slot] = True
            self._failures.pop(place, None)
            self.counts['data'] += not had
        elif not had:
            failure = self._failures.setdefault(place, Failure())
            failure.answers += record['kind'] == 'answer'
            failure.refused |= record['kind'] == 'refused'
            failure.reason = record['reason']

    def _closed(self, failure: Failure) -> bool:
        return failure.refused or failure.answers >= self._o.attempts

    def open(self, settings: dict) -> None:
        """Makes or takes over the folder; no other command can write it until close()."""
        if self._logs:
            return
        label_files.write_settings(self.folder, settings)
        self._logs = {k: label_files.Log(path) for k, path in self.paths.items()}
        self._read()  # another command may have ended in between

    def sync(self) -> None:
        for log in self._logs.values():
            log.sync()

    def close(self) -> None:
        for log in self._logs.values():
            log.close()

    def add(self, kind: str, job: Job, record: dict, usage: dict | None = None) -> bool:
        """Writes the line of an answer; returns whether its job is closed. usage: see Run._usage."""
        record = job.record() | record | (usage or {'prompt_tokens': 0, 'answer_tokens': 0})
        record['cost'] = self.price(record['prompt_tokens'], record['answer_tokens'])
        self._logs[kind].add(record)
        self._note(kind, record)
        failure = self._failures.get((job.part.name, job.row, job.slot))
        return failure is None or self._closed(failure)

    def price(self, prompt_tokens: int, answer_tokens: int) -> float:
        return (prompt_tokens * self._o.price_in + answer_tokens * self._o.price_out) / 1e6

    def labelled(self, part: label_prompts.Part) -> np.ndarray:
        """bool [N, V]: which of the drawn positions have a label."""
        return self._labelled[part.name] & (part.positions >= 0)

    def wanted(self, part: label_prompts.Part) -> np.ndarray:
        """bool [N, V]: for which a server is to be asked."""
        out = (part.positions >= 0) & ~self._labelled[part.name]
        for (name, row, slot), failure in self._failures.items():
            if name == part.name and self._closed(failure):
                out[row, slot] = False
        return out

    def reasons(self) -> dict[str, int]:
        """Why there is no label -> how many, most frequent first."""
        drawn = {n: p.positions >= 0 for n, p in self._parts.items()}
        missing = sum(int((d & ~self._labelled[n]).sum()) for n, d in drawn.items())
        out = collections.Counter(f.reason for (n, row, slot), f in self._failures.items() if drawn[n][row, slot])
        if missing > out.total():
            out['not asked'] = missing - out.total()
        return dict(out.most_common())

    def why(self) -> str:
        return ', '.join(f'{n} {reason}' for reason, n in list(self.reasons().items())[:5]) or 'none'

    def as_dict(self) -> dict:
        ledger = {k: getattr(self, k) for k in ('answers', 'prompt_tokens', 'answer_tokens', 'cost')}
        return ledger | {'answers_counted_here': self.estimated}

    def spent(self) -> str:
        cost = f', cost {self.cost:.2f}' if self.cost else ''
        here = f' ({self.estimated} answers counted with the tokenizer of the subject)' if self.estimated else ''
        return f'{self.prompt_tokens:,} prompt and {self.answer_tokens:,} answer tokens{cost}{here}'


class Run:
    """Asks for every job of `jobs`, --max_concurrency at a time. prompt(job): the text that is sent."""

    def __init__(self, o, settings: dict, jobs, prompt, tally: Tally, tokenizer, key: str | None):
        self.o, self.tally = o, tally
        self._settings, self._jobs, self._prompt = settings, jobs, prompt
        self._tokenizer, self._key = tokenizer, key
        self._number = itertools.count()
        self._in_flight, self._reserved, self._useless = 0, 0.0, 0

    async def main(self, display: generate.Display) -> None:
        """Raises LensError; what was answered until then is on disk."""
        o, stopped = self.o, []
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        for s in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(s, lambda s=s: (stopped.append(s.name), task.cancel()))
        urls = [u for u in o.server_urls.split(',') if u.strip()]
        try:
            async with Servers(urls, None, ASK_AGAIN_S, o.model, o.timeout, display.print, self._key) as self.servers:
                await self.servers.start()
                self.tally.open(self._settings)
                await self._all(display)
                display.update(self.servers, last=True)
        except asyncio.CancelledError:
            raise LensError(
                f'Stopped by {" ".join(stopped)} with {self.tally.counts["data"]} labels ({self.tally.spent()}): the '
                'same command goes on.'
            ) from None
        except BaseExceptionGroup as group:
            raise generate.first(group) from None

    async def _all(self, display: generate.Display) -> None:
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self.servers.watch()), group.create_task(self._refresh(display))]
            async with asyncio.TaskGroup() as workers:
                for _ in range(self.o.max_concurrency):
                    workers.create_task(self._work())
            for task in background:
                task.cancel()

    async def _refresh(self, display: generate.Display) -> None:
        while True:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(self.tally.sync)
            display.update(self.servers)

    async def _work(self) -> None:
        for job in self._jobs:  # one iterator for all workers
            await self._label(job)

    async def _label(self, job: Job) -> None:
        """Asks until the job has a label or is given up."""
        o, prompt, failures = self.o, self._prompt(job), 0
        body = {'model': o.model, 'messages': [{'role': 'user', 'content': prompt}]}
        body |= {'max_tokens': o.max_tokens, 'temperature': o.temperature}
        most = self.tally.price(len(prompt.encode()) + TEMPLATE_TOKENS, o.max_tokens)
        while True:
            closed = False
            try:
                async with self._affordable(most):
                    answer = await self.servers.complete(next(self._number), body)
                    closed = self._take(job, prompt, answer)
            except Refused as e:
                closed = self._fail(job, 'refused', str(e))
            except Failed as e:
                failures += e.counts
                if failures >= max(3, 2 * len(self.servers.all)):
                    self._fail(job, 'failed', str(e))
                    closed = True
                else:
                    await asyncio.sleep(PAUSE_S)
            if closed:
                return

    @contextlib.asynccontextmanager
    async def _affordable(self, most: float):
        """Waits until `most` cannot exceed --max_cost, whatever the requests under way will cost."""
        while self.o.max_cost and self.tally.cost + self._reserved + most > self.o.max_cost:
            if not self._in_flight:
                raise LensError(
                    f'--max_cost={self.o.max_cost:g} is reached: {self.tally.counts["data"]} labels, '
                    f'{self.tally.spent()}, and the next request may cost {most:.2g}. Raise it to go on, or make the '
                    'arrays of what is there with --finish.'
                )
            await asyncio.sleep(0.1)
        self._in_flight, self._reserved = self._in_flight + 1, self._reserved + most
        try:
            yield
        finally:
            self._in_flight, self._reserved = self._in_flight - 1, self._reserved - most

    def _take(self, job: Job, prompt: str, answer: Answer) -> bool:
        """Notes an answer; returns whether its job is closed."""
        usage = self._usage(prompt, answer)
        answer.server.add_tokens(usage['answer_tokens'])
        try:
            text = label_prompts.parse(answer.message, answer.finish_reason)
        except label_prompts.BadAnswer as e:
            said = str(answer.message.get('content'))[:SAID_CHARS]
            return self._fail(job, 'answer', str(e), usage | {'content': said})
        return self.tally.add('labels', job, {'text': text}, usage)

    def _usage(self, prompt: str, answer: Answer) -> dict:
        """What the server says that the answer has used; without that, by the tokenizer of the subject."""
        if answer.prompt_tokens is not None and answer.tokens is not None:
            return {'prompt_tokens': answer.prompt_tokens, 'answer_tokens': answer.tokens}
        said = ' '.join(v for k, v in answer.message.items() if isinstance(v, str) and k != 'role')  # and thinking
        prompt_tokens, tokens = (len(self._tokenizer(t)['input_ids']) for t in (prompt, chat_data.clean(said)))
        return {'prompt_tokens': prompt_tokens, 'answer_tokens': tokens, 'estimated': True}

    def _fail(self, job: Job, kind: str, reason: str, usage: dict | None = None) -> bool:
        """Notes an answer without a label or that there is none; returns whether the job is closed.

        Raises LensError where nothing that came so far was a label.
        """
        closed = self.tally.add('failures', job, {'kind': kind, 'reason': reason[:REASON_CHARS]}, usage)
        self.tally.counts[WITHOUT] += closed or kind == 'failed'
        self._useless += kind != 'failed'
        if not self.tally.counts['data'] and self._useless >= max(USELESS, self.o.max_concurrency):
            raise LensError(
                f'{self._useless} answers and not one label ({self.tally.why()}; {self.tally.spent()}): mend --model, '
                '--max_tokens or --instruction, then add --retry_failures.'
            )
        return closed
