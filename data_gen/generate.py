"""Chats with thinking from OpenAI-compatible servers: python -m data_gen.generate --input_dataset=… --output_path=…

In every chat one assistant turn is chosen by the length of the prompt before it and written anew by the served
model; later turns are dropped. A question without an answer gets its first (data_gen.questions makes such). Answers
stream to OUTPUT/data.jsonl; a run that was stopped, in whatever way, goes on with --resume. At the end OUTPUT/parquet
and OUTPUT/dataset hold the rows in the order of the input, and OUTPUT/stats.json the lengths. rejected.jsonl, failed.jsonl and skipped.jsonl name the other rows and why.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib

from lens.errors import LensError, harmless, need_package, shown

from . import documents, requests, rollouts, servers, tables, turns
from .options import command, need, option
from .requests import LOCAL, Request
from .servers import Answer, Failed

SHOWN_CHARS = 4000  # of the first answer and the first row
ANSWERED = ('thinking_tokens', 'content_tokens')
# what a resumed run may not change
COMPARED = ('model', 'reasoning_level', 'system_prompt', 'target_total_tokens', 'anchor_prompt_tokens')
COMPARED += ('max_completion_tokens', 'temperature', 'top_p')


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    input_dataset: str = option('', 'File, folder or Hub id of the chats, as data_gen.pretokenize reads them.')
    input_split: str = option('train', 'Split of the input.')
    input_column: str = option('', 'Column of chats, or QUESTION,ANSWER; found where not given.')
    output_path: str = option('', 'Folder for the JSON lines, the data set and stats.json.')
    server_urls: str = option('', f'Servers, separated by commas; {LOCAL} where no registry is given either.')
    server_registry: str = option('', 'Text file with one URL per line, read again while running.')
    registry_refresh_interval: float = option(5.0, 'Seconds between two readings of the registry.', 1)
    api_key_env: str = option('', 'Environment variable that holds the API key, for servers that want one.')
    model: str = option('openai/gpt-oss-20b', 'Name of the served model.')
    tokenizer: str = option('', 'Folder or Hub id of the tokenizer that counts; --model where not given.')
    reasoning_level: str = option(
        'high', 'Sent as the system line "Reasoning: LEVEL"; empty, for models that do not think: no line.'
    )
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


class Generation:
    """The requests.Work of a generation: reads rows, chooses turns, makes records."""

    unit = 'rows'

    def __init__(self, options: GenerateOptions, table, form: tuple, journal: rollouts.Rows, planner: turns.Planner):
        self.options, self.journal, self.total = options, journal, journal.rows
        self._planner, self._plans, self._shown = planner, self._all_plans(table, form), set()

    def _all_plans(self, table, form: tuple):
        """The plans of the unfinished rows; None for a row that has none, which is noted."""
        left = self.journal.unfinished()
        for index, row in table.rows(int(left[0])) if len(left) else ():
            if index == self.total:
                return
            if not self.journal.finished(index):
                try:
                    yield self._planner.plan(index, documents.messages(row, *form))
                except (turns.Skip, ValueError) as e:
                    self.journal.append('skipped', {'index': index, 'reason': str(e)})
                    yield None

    def next(self) -> Request | None:
        plan, o = next(self._plans, requests.END), self.options
        if plan is None or plan is requests.END:
            return plan
        body = {'model': o.model, 'messages': plan.messages, 'max_tokens': plan.max_tokens}
        return Request(plan, body | {'temperature': o.temperature, 'top_p': o.top_p})

    def take(self, request: Request, answer: Answer) -> bool:
        self._show('raw response', f' ({answer.server.url}):\n{shown(answer.server.hide(answer.raw), SHOWN_CHARS)}')
        record = self._planner.record(request.job, answer)
        answer.server.add_tokens(answer.tokens or sum(v for k, v in record['tokens'].items() if k in ANSWERED))
        text = harmless(json.dumps(record, indent=1, ensure_ascii=False), '\n')
        self._show('finished example', f':\n{text[:SHOWN_CHARS]}{" …" if len(text) > SHOWN_CHARS else ""}')
        return self.journal.append('data', record)

    def _show(self, what: str, text: str) -> None:
        if what not in self._shown:
            self._shown.add(what)
            servers.say(f'First {what}{text}')

    def give_up(self, request: Request, attempts: int, e: Failed) -> None:
        kind, why = ('rejected', {'status': e.refused}) if e.refused else ('failed', {'attempts': attempts})
        self.journal.append(kind, {'index': request.job.index} | why | {'reason': str(e)})

    def progress(self) -> str:
        return f'{self.journal.counts["data"]} rows done'


def _servers(o: GenerateOptions) -> servers.Servers:
    urls = o.server_urls or ('' if o.server_registry else LOCAL)
    more = {'registry': o.server_registry, 'interval_s': o.registry_refresh_interval}
    return servers.Servers(urls, o.model, o.timeout, **more, key=requests.api_key(o.api_key_env))


def generate(options: GenerateOptions) -> str:
    """Runs to the end; returns one line that says where the result is. Raises LensError."""
    need(options, 'input_dataset', 'output_path')
    need_package('aiohttp', 'datagen', 'Asking servers')
    from lens import hf  # with JAX, which --help needs not

    table = tables.open_table(options.input_dataset, options.input_split)
    form = documents.row_format(table, options.input_column or None)
    if form[0] == 'text':
        raise LensError(f'{table.name} holds texts (in {form[1][0]}) and no chats: name a column of them.')
    planner = turns.Planner(hf.load_tokenizer(options.tokenizer or options.model), options)
    rows = min(table.count, options.max_samples or table.count)
    first = json.dumps(next(table.rows(0))[1], sort_keys=True, default=str)
    settings = {k: getattr(options, k) for k in COMPARED}
    settings |= {'input_column': ','.join(form[1]), 'first_row_sha256': hashlib.sha256(first.encode()).hexdigest()}
    partial = pathlib.Path(options.partial_jsonl) if options.partial_jsonl else None
    folder = pathlib.Path(options.output_path)
    journal = rollouts.Rows(folder, partial, rows, settings, options.resume)
    with contextlib.closing(journal):
        if not partial and journal.paths['data'] != folder / 'data.jsonl':
            print(f'Continuing {journal.paths["data"]}, which {folder / "settings.json"} names')
        if len(journal.unfinished()):
            work = Generation(options, table, form, journal, planner)
            requests.Engine(work, _servers(options), options.max_concurrency).run()
        journal.open()
        counts = ', '.join(f'{n} {"done" if k == "data" else k}' for k, n in journal.counts.items())
        if not journal.counts['data']:
            most = max(rollouts.KINDS[1:], key=journal.counts.get)
            raise LensError(f'No row has an answer ({counts}): {journal.paths[most]} says why.')
        print(rollouts.as_text(rollouts.finalise(journal)))
    again = ' (--resume tries the failed ones again)' if journal.counts['failed'] else ''
    return f'{folder / "dataset"} and {folder / "parquet"}: {counts}{again}'


def main() -> None:
    command(GenerateOptions, generate)


if __name__ == '__main__':
    main()
