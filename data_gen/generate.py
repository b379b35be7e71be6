"""Chats with thinking from OpenAI-compatible servers: python -m data_gen.generate --input_dataset=… --output_path=…

In every chat one assistant turn is chosen by the length of the prompt before it and written anew by the served
model; later turns are dropped. Answers stream to OUTPUT/data.jsonl; a run that was stopped, in whatever way, goes
on with --resume. At the end OUTPUT/parquet and OUTPUT/dataset hold the rows in the order of the input, and
OUTPUT/stats.json the lengths. rejected.jsonl, failed.jsonl and skipped.jsonl name the other rows and why.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import signal
import sys
import time

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from data_gen import chat_data, rollouts, turns
from data_gen.servers import Failed, Refused, Servers
from lens import cli, hf
from lens.errors import LensError
from lens.logger import clock

ATTEMPT_PAUSE_S = 0.5
LOCAL = 'http://localhost:8000/v1'
LINE_EVERY_S = 10.0
WRITTEN_TOGETHER = 256  # most records of one fsync
ANSWERED = ('thinking_tokens', 'content_tokens')
# what a resumed run may change
NOT_COMPARED = {'input_dataset', 'input_split', 'output_path', 'server_urls', 'server_registry', 'resume'} | {
    'registry_refresh_interval',
    'tokenizer',
    'timeout',
    'max_concurrency',
    'max_samples',
    'partial_jsonl',
}


def option(default, text: str, minimum: float | None = None):
    """A field of Options and its flag."""
    return dataclasses.field(default=default, metadata={'help': text, 'minimum': minimum})


@dataclasses.dataclass(frozen=True)
class Options:
    input_dataset: str = option('', 'Hub id, save_to_disk folder, .jsonl or .parquet file, folder of Parquet files.')
    input_split: str = option('train', 'Split of the input.')
    input_column: str = option('', 'Column with lists of {role, content}; found where not given.')
    output_path: str = option('', 'Folder for the JSON lines, the data set and stats.json.')
    server_urls: str = option('', f'Servers, separated by commas; {LOCAL} where no registry is given either.')
    server_registry: str = option('', 'Text file with one URL per line, read again while running.')
    registry_refresh_interval: float = option(5.0, 'Seconds between two readings of the registry.', 1)
    model: str = option('openai/gpt-oss-20b', 'Name of the served model.')
    tokenizer: str = option('', 'Folder or Hub id of the tokenizer that counts; --model where not given.')
    reasoning_level: str = option('high', 'Sent as the system line "Reasoning: LEVEL"; empty: no line.')
    system_prompt: str = option('', 'Sent in place of that line.')
    target_total_tokens: int = option(4000, 'Tokens that prompt and answer may have together.', turns.MARGIN + 1)
    anchor_prompt_tokens: int = option(3000, 'The assistant turn with a prompt nearest to this is written anew.', 0)
    max_completion_tokens: int = option(1536, 'Most tokens of an answer.', 1)
    temperature: float = option(0.2, 'Of sampling.', 0)
    top_p: float = option(0.95, 'Of sampling.', 0)
    timeout: float = option(120.0, 'Seconds for one request.', 0.1)
    max_concurrency: int = option(8, 'Requests at a time.', 1)
    max_samples: int = option(0, 'Only the first rows of the input; 0: all.', 0)
    resume: bool = option(False, 'Continue what is in the output folder.')
    partial_jsonl: str = option('', 'Other place of data.jsonl; --resume remembers it.')


class Display:
    """A bar on a terminal, a line now and then elsewhere: rows, tokens per second of each server, time left.

    journal: its `counts` are shown; `data` is what is wanted. unit: what it counts.
    """

    def __init__(self, journal, rows: int, unit: str = 'rows'):
        self.console = Console()
        self._journal, self._rows, self._unit = journal, rows, unit
        self._began, self._begun_with = time.monotonic(), self._finished()
        self._line_at = self._began + LINE_EVERY_S
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[text]}'))
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task('', total=rows, text='')

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *exc):
        self._bar.stop()

    def print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _finished(self) -> int:
        return sum(self._journal.counts.values())

    def update(self, servers: Servers, last: bool = False) -> None:
        finished, now = self._finished(), time.monotonic()
        speeds = ', '.join(f'{s.label} {s.speed():.0f} tok/s' for s in servers.all.values())
        new = finished - self._begun_with
        left = clock((self._rows - finished) * (now - self._began) / new) if new else '?'
        other = ''.join(f'  {n} {k}' for k, n in self._journal.counts.items() if k != 'data' and n)
        text = f'{speeds}{other}  ETA {left}'
        self._bar.update(self._task, completed=finished, text=text)
        if not self.console.is_terminal and (last or now >= self._line_at):
            self._line_at = now + LINE_EVERY_S
            self.print(f'{finished}/{self._rows} {self._unit}  {text}')


class Run:
    """Reads, asks and writes at the same time; every part waits for the next one, so memory is bounded."""

    def __init__(self, options: Options, table, column: str, planner: turns.Planner, journal: rollouts.Journal):
        self.options, self.planner, self.journal = options, planner, journal
        self._rows = self._unfinished_rows(table, column)
        self._plans = asyncio.Queue(options.max_concurrency)
        self._results = asyncio.Queue(WRITTEN_TOGETHER)
        self._tokenizing = concurrent.futures.ThreadPoolExecutor(1)
        self._shown = {'raw': False, 'example': False}

    def _unfinished_rows(self, table, column: str):
        left = self.journal.unfinished()
        for index, row in table.rows(int(left[0]), len(self.journal.offset)):
            if not self.journal.finished(index):
                yield index, (row or {}).get(column)

    def _next_plan(self) -> turns.Plan | tuple[str, dict] | None:
        """The next request, the record of a row without one, or None at the end of the input."""
        for index, value in self._rows:
            try:
                return self.planner.plan(index, value)
            except turns.Skip as e:
                return 'skipped', {'index': index, 'reason': str(e)}
        return None

    async def _in_thread(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *args)

    async def _read(self) -> None:
        while (plan := await self._in_thread(self._next_plan)) is not None:
            await (self._plans if isinstance(plan, turns.Plan) else self._results).put(plan)
        for _ in range(self.options.max_concurrency):
            await self._plans.put(None)

    async def _work(self) -> None:
        while (plan := await self._plans.get()) is not None:
            await self._results.put(await self._answer(plan))

    async def _answer(self, plan: turns.Plan) -> tuple[str, dict]:
        """What becomes of a row: its record and the file it belongs to."""
        o = self.options
        body = {'model': o.model, 'messages': plan.messages, 'max_tokens': plan.max_tokens}
        body |= {'temperature': o.temperature, 'top_p': o.top_p}
        attempts = tries = 0
        while True:
            try:
                answer = await self.servers.complete(plan.index + tries, body)
                self._show('raw', f'First raw response ({answer.server.url}):\n{answer.raw}')
                record = await self._in_thread(self.planner.record, plan, answer)
                answer.server.add_tokens(answer.tokens or sum(v for k, v in record['tokens'].items() if k in ANSWERED))
                self._show('example', f'First finished example:\n{json.dumps(record, indent=1, ensure_ascii=False)}')
                return 'data', record
            except Refused as e:
                return 'rejected', {'index': plan.index, 'status': e.status, 'reason': str(e)}
            except Failed as e:
                attempts, tries = attempts + e.counts, tries + 1
                if attempts >= max(3, 2 * len(self.servers.all)):
                    return 'failed', {'index': plan.index, 'attempts': attempts, 'reason': str(e)}
            await asyncio.sleep(ATTEMPT_PAUSE_S)

    def _show(self, what: str, text: str) -> None:
        if not self._shown[what]:
            self._shown[what] = True
            self.display.print(text)

    def _take(self, batch: list) -> list:
        while not self._results.empty() and len(batch) < WRITTEN_TOGETHER:
            batch.append(self._results.get_nowait())
        return batch

    async def _write(self) -> None:
        ended = False
        while not ended:
            batch = self._take([await self._results.get()])
            ended = batch[-1] is None
            await asyncio.to_thread(self.journal.append, [r for r in batch if r is not None])

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            self.display.update(self.servers)

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self.servers.watch()), group.create_task(self._refresh())]
            writer = group.create_task(self._write())
            async with asyncio.TaskGroup() as rows:
                rows.create_task(self._read())
                for _ in range(self.options.max_concurrency):
                    rows.create_task(self._work())
            await self._results.put(None)
            await writer
            for task in background:
                task.cancel()

    async def main(self, display: Display) -> None:
        """Raises LensError; what was answered until then is on disk."""
        self.display, o, stopped = display, self.options, []
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        for s in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(s, lambda s=s: (stopped.append(s.name), task.cancel()))
        urls = [u for u in o.server_urls.split(',') if u.strip()] or ([] if o.server_registry else [LOCAL])
        arguments = (o.server_registry or None, o.registry_refresh_interval, o.model, o.timeout, display.print)
        try:
            async with Servers(urls, *arguments) as self.servers:
                await self.servers.start()
                self.journal.open()
                await self._all()
                display.update(self.servers, last=True)
        except asyncio.CancelledError:
            if self.journal.is_open:
                self.journal.append([r for r in self._take([]) if r is not None])
            done = self.journal.counts['data']
            raise LensError(f'Stopped by {" ".join(stopped)} with {done} rows done: --resume goes on.') from None
        except BaseExceptionGroup as group:
            raise first(group) from None
        finally:
            self._tokenizing.shutdown(wait=True, cancel_futures=True)


def first(e: BaseException) -> BaseException:
    """The error that ended a group of tasks."""
    while isinstance(e, BaseExceptionGroup):
        e = e.exceptions[0]
    return e


def generate(options: Options) -> str:
    """Runs to the end; returns one line that says where the result is. Raises LensError."""
    table = chat_data.open_table(options.input_dataset, options.input_split)
    column = chat_data.find_column(table, options.input_column or None)
    planner = turns.Planner(hf.load_tokenizer(options.tokenizer or options.model), options)
    rows = min(len(table), options.max_samples or len(table))
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in NOT_COMPARED}
    first = json.dumps(next(table.rows(0, 1))[1], sort_keys=True, default=str)
    settings |= {'input_column': column, 'first_row_sha256': hashlib.sha256(first.encode()).hexdigest()}
    partial = pathlib.Path(options.partial_jsonl) if options.partial_jsonl else None
    folder = pathlib.Path(options.output_path)
    journal = rollouts.Journal(folder, partial, rows, settings, options.resume)
    with contextlib.closing(journal), Display(journal, rows) as display:
        if not partial and journal.paths['data'] != folder / 'data.jsonl':
            display.print(f'Continuing {journal.paths["data"]}, which {folder / "settings.json"} names')
        if len(journal.unfinished()):
            asyncio.run(Run(options, table, column, planner, journal).main(display))
        counts = ', '.join(f'{n} {"done" if k == "data" else k}' for k, n in journal.counts.items())
        if not journal.counts['data']:
            raise LensError(f'No row has an answer ({counts}): {journal.reason_file()} says why.')
        display.print(rollouts.as_text(rollouts.finalise(journal)))
    again = ' (--resume tries the failed ones again)' if journal.counts['failed'] else ''
    return f'{folder / "dataset"} and {folder / "parquet"}: {counts}{again}'


def main(_):
    given = {f.name: flags.FLAGS[f.name].value for f in dataclasses.fields(Options)}
    for name in ('input_dataset', 'output_path'):
        if not given[name]:
            raise LensError(f'--{name} is needed.')
    print(generate(Options(**given)))


def define_flags(options=Options) -> None:
    """A flag for every field of `options`."""
    kinds = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
    for f in dataclasses.fields(options):
        bound = {} if f.metadata['minimum'] is None else {'lower_bound': f.metadata['minimum']}
        kinds[f.type](f.name, f.default, f.metadata['help'], **bound)


if __name__ == '__main__':
    define_flags()
    # names may be written with dashes
    sys.argv[1:] = [
        re.sub(r'^--?[a-z][a-z-]*', lambda m: '--' + m[0].lstrip('-').replace('-', '_'), a) for a in sys.argv[1:]
    ]
    cli.run(main)
