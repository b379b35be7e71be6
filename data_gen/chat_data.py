"""Reading chat data sets: Hub id, save_to_disk directory, Parquet, JSON lines; what is a chat in a row.

open_table gives an object with `name`, `columns`, len(), `rows(start, stop)` and `identity`, what tells a changed
input from the one that was read. Rows are streamed, never held, and a table can be pickled for a worker process. messages_of turns the value of a chat column into a list of
{role, content[, thinking]}.
"""

import bisect
import json
import os
import pathlib
import re

from lens.errors import LensError

BATCH = 256  # rows that are in memory at a time
LINES_PER_MARK = 1024  # a table of JSON lines knows the byte offset of every 1024th row
JSON_SUFFIXES = ('.jsonl', '.json', '.ndjson')
KNOWN_COLUMNS = ('messages', 'conversation', 'conversations', 'chat', 'dialog', 'dialogue', 'turns', 'prompt')
ROLES = {'human': 'user', 'gpt': 'assistant', 'bot': 'assistant', 'model': 'assistant'}
KNOWN_ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
LOOK = 100  # rows that are looked at to find a column


class LineTable:
    """A file of JSON objects, or of texts, one per line; empty lines are no rows."""

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, str(path)
        self.is_json = path.suffix in JSON_SUFFIXES
        self._marks, self._count, offset = [], 0, 0
        with path.open('rb') as f:
            for line in f:
                if not line.isspace():
                    if self._count % LINES_PER_MARK == 0:
                        self._marks.append(offset)
                    self._count += 1
                offset += len(line)
        self.columns = list({k: None for _, row in self.rows(0, LOOK) if row for k in row})
        self.identity = _sizes_and_times([path])

    def __len__(self) -> int:
        return self._count

    def rows(self, start: int = 0, stop: int | None = None):
        """Yields (index, row); row is None where the line is no JSON object."""
        stop = self._count if stop is None else min(stop, self._count)
        if start >= stop:
            return
        index = start // LINES_PER_MARK * LINES_PER_MARK
        with self.path.open('rb') as f:
            f.seek(self._marks[index // LINES_PER_MARK])
            for line in f:
                if line.isspace():
                    continue
                if index >= stop:
                    return
                if index >= start:
                    yield index, self._parse(line)
                index += 1

    def _parse(self, line: bytes) -> dict | None:
        if not self.is_json:
            return {'text': line.decode('utf-8', 'replace').rstrip('\r\n')}
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            return None
        return row if isinstance(row, dict) else None


class ParquetTable:
    """One or several Parquet files, in the order of their names."""

    def __init__(self, name: str, paths: list[pathlib.Path]):
        import pyarrow
        import pyarrow.parquet

        self.name = name
        self._count, self.columns, self._groups = 0, None, []  # (first row, file, row group)
        for path in paths:
            try:
                meta = pyarrow.parquet.read_metadata(path)
            except (pyarrow.ArrowException, OSError) as e:
                raise LensError(f'{path} is not a Parquet file ({_first_line(e)}).') from None
            self.columns = self.columns or meta.schema.to_arrow_schema().names
            for group in range(meta.num_row_groups):
                self._groups.append((self._count, path, group))
                self._count += meta.row_group(group).num_rows
        self.identity = _sizes_and_times(paths)

    def __len__(self) -> int:
        return self._count

    def rows(self, start: int = 0, stop: int | None = None):
        """Yields (index, row)."""
        import pyarrow.parquet

        stop = self._count if stop is None else min(stop, self._count)
        at = max(bisect.bisect_right(self._groups, start, key=lambda g: g[0]) - 1, 0)
        for index, path, group in self._groups[at:]:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(BATCH, row_groups=[group]):
                    if index >= stop:
                        return
                    if index + batch.num_rows > start:
                        yield from ((i, r) for i, r in enumerate(batch.to_pylist(), index) if start <= i < stop)
                    index += batch.num_rows


class DatasetTable:
    """A data set of the `datasets` library, memory-mapped."""

    def __init__(self, name: str, dataset):
        self.name, self.columns = name, list(dataset.column_names)
        self._dataset = dataset.with_format('arrow')
        self.identity = dataset._fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, start: int = 0, stop: int | None = None):
        """Yields (index, row)."""
        stop = len(self) if stop is None else min(stop, len(self))
        for at in range(start, stop, BATCH):
            yield from enumerate(self._dataset[at : min(at + BATCH, stop)].to_pylist(), at)


def open_table(source: str, split: str = 'train', config: str | None = None):
    """A table of `source`: a file, a folder, or a Hub id. Raises LensError, also where it has no rows."""
    path = pathlib.Path(source)
    if path.suffix == '.parquet' and path.is_file():
        table = ParquetTable(source, [path])
    elif path.is_file():
        table = LineTable(path)
    elif path.is_dir():
        table = _open_folder(path, split)
    elif path.suffix in (*JSON_SUFFIXES, '.parquet', '.txt') or path.is_absolute() or source.count('/') > 1:
        raise LensError(f'{source} does not exist: give a file, a folder or the name of a data set on the Hub.')
    else:
        table = DatasetTable(source, _from_hub(source, split, config))
    if not len(table):
        raise LensError(f'{source} is empty: it has no rows.')
    return table


def _open_folder(path: pathlib.Path, split: str):
    if (path / 'dataset_dict.json').is_file() or (path / 'state.json').is_file():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(path))
        except (ValueError, OSError, KeyError, TypeError) as e:
            raise LensError(f'{path} is not a whole saved data set ({_first_line(e)}).') from None
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise LensError(f'{path} has no split {split}; its splits: {", ".join(loaded)}.')
            loaded = loaded[split]
        return DatasetTable(str(path), loaded)
    files = sorted(path.glob(f'{split}*.parquet')) or sorted(path.glob('*.parquet'))
    if not files:
        raise LensError(f'{path} holds neither a saved data set (state.json, dataset_dict.json) nor Parquet files.')
    return ParquetTable(str(path), files)


def _from_hub(name: str, split: str, config: str | None):
    """More than three configurations and none named: all of them and all splits, shuffled; two or three: an error."""
    import datasets

    try:
        if config is None:
            configs = datasets.get_dataset_config_names(name)
            if len(configs) > 3:
                parts = [d for c in configs for d in datasets.load_dataset(name, c).values()]
                return datasets.concatenate_datasets(parts).shuffle(seed=42)
            if len(configs) > 1:
                raise LensError(f'{name} has the configurations {", ".join(configs)}: name one.')
            config = configs[0] if configs else None
        return datasets.load_dataset(name, config, split=split)
    except LensError:
        raise
    except Exception as e:  # the libraries below raise dozens of kinds
        raise LensError(
            f'{name} is no file or folder, and the Hub gives no such data set and split ({_first_line(e)}).'
        ) from None


def _sizes_and_times(paths: list[pathlib.Path]) -> list:
    return [[x.st_size, x.st_mtime_ns] for x in map(os.stat, paths)]


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')


def messages_of(value) -> list[dict]:
    """[{role, content[, thinking]}] of a chat; raises ValueError that says what is wrong with it.

    Accepts role/content and from/value, a struct of lists (older Parquet), and strings that alternate user, assistant.
    """
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise ValueError('no list of messages')
    if all(isinstance(turn, str) for turn in value):
        return [{'role': ('user', 'assistant')[i % 2], 'content': clean(turn)} for i, turn in enumerate(value)]
    return [_message(i, turn) for i, turn in enumerate(value)]


def _message(i: int, turn) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f'message {i} is no {{role, content}}')
    role = turn.get('role', turn.get('from'))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in KNOWN_ROLES:
        raise ValueError(f'message {i} has the role {role!r}')
    content = turn.get('content', turn.get('value'))
    if isinstance(content, list):  # parts
        texts = [p.get('text') if isinstance(p, dict) else None for p in content]
        content = None if None in texts else ''.join(texts)
    if not isinstance(content, str):
        raise ValueError(f'message {i} has no text')
    out = {'role': role, 'content': clean(content)}
    thinking = next((t for k in ('thinking', 'reasoning_content', 'reasoning') if (t := turn.get(k))), None)
    return out | {'thinking': clean(thinking)} if isinstance(thinking, str) and role == 'assistant' else out


def clean(text: str) -> str:
    """Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes '?'."""
    return text.encode('utf-8', 'replace').decode()


def find_column(table, name: str | None = None) -> str:
    """The chat column of a table: `name`, or the one that holds chats in its first rows. Raises LensError."""
    columns = ', '.join(table.columns) or 'none'
    if name is not None and name not in table.columns:
        raise LensError(f'{table.name} has no column {name}; its columns: {columns}.')
    found = {}
    for _, row in table.rows(0, LOOK):
        for key, value in (row or {}).items():
            try:
                messages_of(value)
            except ValueError:
                continue
            strings = isinstance(value, list) and isinstance(value[0], str)
            if not strings or key == name or key in KNOWN_COLUMNS:
                found[key] = found.get(key, 0) + 1
    if name is not None:
        if name not in found:
            raise LensError(f'Column {name} of {table.name} holds no chats: lists of {{role, content}} are needed.')
        return name
    if not found:
        raise LensError(f'{table.name} has no column of chats (lists of {{role, content}}); its columns: {columns}.')
    known = [c for c in KNOWN_COLUMNS if c in found]
    if not known and len(found) > 1:
        raise LensError(f'{table.name} has several columns of chats ({", ".join(found)}): name one.')
    return known[0] if known else next(iter(found))


def native_thinking(tokenizer) -> bool:
    """Whether the chat template renders a field `thinking` of an assistant message itself."""
    template = tokenizer.chat_template
    text = ' '.join(template.values()) if isinstance(template, dict) else template or ''
    return bool(re.search(r"\.thinking\b|\[['\"]thinking['\"]\]|['\"]thinking['\"] in\b", text))


def inline_thinking(messages: list[dict]) -> list[dict]:
    """{role, content} alone: `thinking` becomes <think>…</think> and a newline before the content."""
    return [
        {
            'role': m['role'],
            'content': f'<think>{m["thinking"]}</think>\n{m["content"]}' if m.get('thinking') else m['content'],
        }
        for m in messages
    ]


def split_thinking(text: str) -> tuple[str | None, str]:
    """(thinking or None, content) of a text with <think>…</think>: the reverse of inline_thinking.

    An opening tag may stand in the prompt, a closing one be cut off.
    """
    before, opened, rest = text.partition('<think>')
    if opened and '</think>' not in before:
        thinking, _, after = rest.partition('</think>')
        before = '' if before.isspace() else before
    elif '</think>' in text:
        before, (thinking, _, after) = '', text.partition('</think>')
    else:
        return None, text
    return thinking or None, before + after.removeprefix('\n')
