"""The report page: what it shows, what it escapes, what it says about bad files."""

import html.parser
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from lens import charts, report
from lens.errors import LensError
from tests.test_files import DAMAGED_LINES

FIELDS = {'name': 24, 'kind': 16, 'friend': 24, 'place': 16, 'object': 16, 'food': 16, 'mood': 12, 'time': 8}
RABBIT = """Once there was a rabbit called Milo. Milo, still cheerful, carried the button. Milo and Jasper ate
 some stew. At twilight Milo felt cheerful. At twilight they met near the village. At twilight there was fresh
 stew. By twilight the stew was gone. What a cheerful rabbit, said Jasper. The rabbit hid the button near the
 village. The rabbit had a friend named Jasper. The stew was cold. Jasper knew why Milo was cheerful."""
BAKER = """Near the meadow was a compass. The compass kept Freya proud. The road to the meadow made the baker
 proud. Everyone knew Freya the baker. Tilda saw that the baker was proud. The proud baker sang until dusk. A
 compass for some rice, thought Tilda. Some rice made Freya proud. Tilda and Freya talked until dusk."""
STORIES = (
    (RABBIT, ('Milo', 'rabbit', 'Jasper', 'village', 'button', 'stew', 'cheerful', 'twilight')),
    (BAKER, ('Freya', 'baker', 'Tilda', 'meadow', 'compass', 'rice', 'proud', 'dusk')),
)
OTHER = dict(zip(FIELDS, ('Otto', 'potter', 'Olga', 'castle', 'mirror', 'jam', 'calm', 'dawn'), strict=True))
FIGURES = (
    ('fve', 0.803, 0.008, 'lens', 'Variance of activations that sampled explanations explain.'),
    ('fve_greedy', 0.846, 0.007, 'lens', 'The same for greedy explanations.'),
    ('fve_sft', 0.742, 0.009, 'lens', 'Where the SFT phase ended: what GRPO started from.'),
    ('variance_recovered', 0.811, 0.008, 'lens', 'Pooled over coordinates, a constant offset not counted.'),
    ('nmse', 0.094, 0.004, 'lens', 'Squared error divided by the squared length of the activation.'),
    ('cosine', 0.951, 0.002, 'lens', 'Mean cosine between activation and reconstruction.'),
    ('fve_shuffled', -0.872, 0.021, 'controls', 'Each activation against the reconstruction of another one.'),
    ('fve_no_activation', -0.118, 0.012, 'controls', 'A decoder that is given a zero vector as activation.'),
    ('fve_mean_baseline', 0.0, None, 'controls', 'Always answering the mean; zero by definition.'),
    ('facts_recall', 0.934, 0.006, 'facts', 'Established facts that greedy explanations name.'),
    ('facts_hallucinated', 0.055, 0.006, 'facts', 'Named facts that are wrong or not established.'),
    ('facts_recall_sampled', 0.889, 0.008, 'facts', 'The same recall at temperature 1.'),
    ('facts_hallucinated_sampled', 0.093, 0.007, 'facts', 'The same at temperature 1.'),
)


def _explanation(rng, tokens, read, facts, wrong, missed):
    """The layout of the tiny world: last tokens newest first, bar, facts; with errors at the given rates."""
    words = [
        {'text': t, 'status': 'right' if t.strip() in facts.values() else 'plain'} for t in tokens[read : read - 3 : -1]
    ]
    words.append({'text': ' |', 'status': 'plain'})
    for field, value in facts.items():
        draw = rng.random()
        if draw < wrong:
            words.append({'text': f' {OTHER[field]}', 'status': 'wrong'})
        elif draw >= wrong + missed:
            words.append({'text': f' {value}', 'status': 'right'})
    words += [{'text': ' |', 'status': 'plain'}] * (12 - len(words))
    return {'tokens': words, 'nmse': float(rng.uniform(0.04, 0.12) + 0.3 * wrong)}


def _samples(rng, count=12):
    for i in range(count):
        text, values = STORIES[i % len(STORIES)]
        tokens = ['<|bos|>', *re.findall(r'\s?\w+|[.,]', text.replace('\n', ''))]
        read = int(rng.integers(18, len(tokens) - 4))
        scene = dict(zip(FIELDS, values, strict=True))
        facts = {k: v for k, v in scene.items() if f' {v}' in tokens[: read + 1]}
        yield {
            'doc_id': 10_000_000 + i,
            'position': read,
            'tokens': tokens,
            'read': read,
            'facts': facts,
            'greedy': _explanation(rng, tokens, read, facts, 0.06, 0.12),
            'sampled': _explanation(rng, tokens, read, facts, 0.15, 0.12),
            'given': _explanation(rng, tokens, read, facts, 0, 0) if i % 4 else None,
        }


def _metrics(rng, sft=600, grpo=700):
    for step in range(1, sft + grpo + 1):
        phase, t = 'sft' if step <= sft else 'grpo', step / 140
        noise = [float(rng.normal(0, 0.02)) for _ in range(5)]
        record = {
            'step': step,
            'phase': phase,
            'kind': 'train',
            'wall_s': 20 + 0.17 * step,
            'fve': 0.8 - 2.2 * math.exp(-t) + noise[0],
            'loss_encoder': 0.14 + 0.8 * math.exp(-t) + noise[1],
            'entropy_nats': 0.42 + 3 * math.exp(-1.4 * t) + 2 * noise[2],
            'loss_decoder': 0.5 + 4 * math.exp(-1.3 * t) + 4 * noise[3] if phase == 'sft' else noise[3],
        }
        if phase == 'grpo':
            record['reward'] = -0.55 + 0.12 * (1 - math.exp(-(step - sft) / 250)) + noise[4]
        yield record
        if step % 100 == 0:
            gain = 0.05 * max(0, step - sft) / grpo
            yield {
                'step': step,
                'phase': phase,
                'kind': 'eval',
                'fve': 0.75 - 2 * math.exp(-t) + gain,
                'fve_greedy': 0.83 - 1.6 * math.exp(-t) + gain / 3,
                'facts_recall': 0.94 * (1 - math.exp(-t)),
                'facts_hallucinated': 0.05 + 0.6 * math.exp(-t),
            }


def _evaluation():
    facts = [
        {
            'field': field,
            'values': count,
            'recall': 0.99 - 0.02 * i,
            'hallucinated': 0.01 + 0.015 * i,
            'recall_sampled': 0.97 - 0.03 * i,
            'hallucinated_sampled': 0.03 + 0.02 * i,
        }
        for i, (field, count) in enumerate(FIELDS.items())
    ]
    figures = {
        name: {'value': v, 'ci95': [v - w, v + w] if w else None, 'group': group, 'meaning': text}
        for name, v, w, group, text in FIGURES
    }
    return {'step': 1300, 'documents': 512, 'activations': 4096, 'figures': figures, 'facts': facts}


def write_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))


def write_metrics(workdir, records):
    """Rows of metrics.jsonl with the keys that each has."""
    write_lines(workdir / 'metrics.jsonl', ({'phase': 'sft', 'wall_s': 1.0} | record for record in records))


def make_run(workdir: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """Writes plausible files of a finished run."""
    rng = np.random.default_rng(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    config = {
        'seed': seed,
        'subject': {'path': 'configs/tiny_subject', 'layer': 3},
        'train': {'batch_size': 32, 'sft_steps': 600, 'grpo_steps': 700, 'learning_rate': 1.5e-3},
    }
    summary = {
        'fve': 0.803,
        'steps': 1300,
        'wall_s': 253.4,
        'subject': 'tiny_subject',
        'layer': 3,
        'command': 'python -m lens.main --config=configs/tiny.py --workdir=runs/tiny',
        'config': 'tiny',
        'versions': {'python': '3.11.7', 'jax': '0.10.2', 'flax': '0.12.8'},
        'commit': '0f3c9d2',
        'seed': seed,
        'device': '2 CPU cores',
    }
    for name, content in (('config', config), ('summary', summary), ('evaluation', _evaluation())):
        (workdir / f'{name}.json').write_text(json.dumps(content))
    write_metrics(workdir, _metrics(rng))
    write_lines(workdir / 'samples.jsonl', _samples(rng))
    return workdir


@pytest.fixture
def workdir(tmp_path):
    return make_run(tmp_path / 'run')


def page_of(workdir):
    return report.write_report(workdir).read_text('utf-8')


def figure_of(page, title):
    """The HTML figure with that title, or ''."""
    return next((f for f in re.findall(r'<figure>.*?</figure>', page, re.DOTALL) if f'<h3>{title} ' in f), '')


class _Balance(html.parser.HTMLParser):
    """Fails on a tag that closes nothing or is left open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ('meta', 'br'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_page_is_well_formed_and_self_contained(workdir):
    page = page_of(workdir)
    parser = _Balance()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r'https?:|src=|href=|url\(|@import|<script|<link|<img| on\w+=', page)
    assert "default-src 'none'" in page
    assert '$' not in page, 'a placeholder was left'
    assert [p.name for p in workdir.iterdir() if p.name.startswith('.')] == []


def test_headline_with_and_without_facts(workdir):
    def tiles():
        return re.findall(r'<div class="tile"><h3>(.*?)</h3><p class="big">(.*?)</p>', page_of(workdir))

    assert tiles() == [
        ('Facts recall', '93.4%'),
        ('Facts hallucinated', '5.5%'),
        ('FVE, temperature 1', '0.803'),
        ('FVE, shuffled', '\N{MINUS SIGN}0.872'),
    ]
    evaluation = _evaluation() | {'facts': []}
    evaluation['figures'] = {k: v for k, v in evaluation['figures'].items() if 'facts' not in k}
    (workdir / 'evaluation.json').write_text(json.dumps(evaluation))
    write_metrics(workdir, [{'step': 1, 'phase': 'sft', 'kind': 'eval', 'fve': 0.1}])
    assert [name for name, _ in tiles()] == ['FVE, temperature 1', 'FVE, greedy', 'FVE, shuffled', 'FVE, no activation']
    assert 'Facts' not in page_of(workdir)


def test_what_words_add_comes_first_where_the_encoder_reads_a_context(workdir):
    assert 'eyond' not in page_of(workdir)
    evaluation = _evaluation()
    more = {'fve_beyond_8': 0.31, 'fve_quote_0': 0.02, 'fve_quote_8': 0.64, 'fve_beyond_shuffled': -0.2}
    evaluation['figures'] |= {k: {'value': v, 'ci95': [v - 0.01, v + 0.01], 'meaning': ''} for k, v in more.items()}
    (workdir / 'evaluation.json').write_text(json.dumps(evaluation))
    rows = [{'kind': 'train', 'fve_beyond': 0.2}, {'kind': 'eval', 'fve_beyond_8': 0.25}]
    write_metrics(workdir, [{'step': i} | row for i in (1, 2) for row in rows])
    sample = next(_samples(np.random.default_rng(0))) | {'nmse_without_words': 0.75}
    write_lines(workdir / 'samples.jsonl', [sample])
    page = page_of(workdir)
    tiles = re.findall(r'<div class="tile"><h3>(.*?)</h3><p class="big">(.*?)</p>', page)
    assert tiles[:2] == [('Beyond the last 8 tokens', '0.310'), ('FVE, last 8 tokens', '0.640')]
    assert tiles[3] == ('FVE, beyond shuffled', '\N{MINUS SIGN}0.200') and 'FVE, quote 0' in page
    assert 'the last 8 tokens of the text' in page and 'words and nothing else' not in page
    assert '; error without words 0.750</p>' in page
    curves = figure_of(page, 'Share beyond the context')
    assert 'sampled, step 2: 0.250' in curves and 'training batches' in curves
    parser = _Balance()
    parser.feed(page)
    assert not parser.open


def fill(workdir, evil):
    """Writes files whose every text is this one."""
    words = {'tokens': [{'text': f' {evil}', 'status': 'wrong'}, {'text': evil, 'status': evil}], 'nmse': 0.1}
    write_lines(
        workdir / 'samples.jsonl',
        [
            {
                'doc_id': evil,
                'position': evil,
                'tokens': [evil, f' {evil}', evil],
                'read': 1,
                'facts': {evil: evil},
                'greedy': words,
                'sampled': words,
                'given': words,
            }
        ],
    )
    records = [
        {'step': i, 'phase': phase, 'kind': kind, 'fve': 0.1 * i}
        for i, phase in enumerate((evil, 'sft'))
        for kind in ('train', 'eval')
    ]
    write_metrics(workdir, records)
    figure = {'value': 0.5, 'ci95': None, 'group': evil, 'meaning': evil}
    evaluation = {
        'step': evil,
        'documents': evil,
        'figures': {evil: figure},
        'facts': [{'field': evil, 'values': evil, 'recall': 0.5}],
    }
    (workdir / 'evaluation.json').write_text(json.dumps(evaluation))
    (workdir / 'config.json').write_text(json.dumps({evil: evil}))
    names = ('subject', 'layer', 'config', 'command', 'device', 'versions', 'commit', 'seed')
    (workdir / 'summary.json').write_text(json.dumps(dict.fromkeys(names, evil)))


def test_everything_from_files_is_escaped(workdir):
    fill(workdir, '<script>alert("1")</script>')
    page = page_of(workdir)
    assert '<script' not in page and '"1"' not in page
    assert page.count('&lt;script&gt;') > 25


class _Directions(html.parser.HTMLParser):
    """Collects the elements around every text that has a Hebrew letter."""

    def __init__(self):
        super().__init__()
        self.open, self.around = [], []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in ('meta', 'br') else [(tag, dict(attrs))]

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if 'א' in data:
            self.around.append(list(self.open))


def test_the_direction_of_texts_from_files_ends_with_them(workdir):
    """Blocks and cells are isolated by every browser, what stands within a sentence by the page."""
    fill(workdir, 'אב')
    page, parser = page_of(workdir), _Directions()
    parser.feed(page)
    isolated = re.search(r'\n([^{\n]*) \{ unicode-bidi: isolate; \}', page)[1]
    assert {'.story', '.words', '.facts span', '.missed', 'code'} <= set(isolated.split(', '))
    alone = ('bdi', 'dd', 'td', 'th', 'pre', 'text', 'title', 'code', 'dt')
    for around in parser.around:
        blocks = [tag for tag, attrs in around if tag in alone or attrs.get('dir') == 'auto' or tag == 's']
        assert blocks or ('dd', {'class': 'facts'}) in around or around[-1][0] == 'small', around
    assert len(parser.around) > 25


@pytest.mark.parametrize('evil', ['\u202egnp', '\x1b[2J', 'a\x00b', '\u2066x', '\ud800', '\u200b\U000e0041', '\x9b1m'])
def test_control_characters_of_files_are_shown_as_such(workdir, evil):
    fill(workdir, f'{evil}\n\u05d0\u200d')
    page = page_of(workdir)
    assert {c for c in page if not c.isprintable()} == {'\n', '\u200d'} and page.count('\ufffd') > 25


def test_sample_marks_read_token_later_text_and_missed_facts(workdir):
    tokens = [f' before{i}' for i in range(100)] + [' here', ' later']
    write_lines(
        workdir / 'samples.jsonl',
        [
            {
                'doc_id': 7,
                'position': 100,
                'tokens': tokens,
                'read': 100,
                'facts': {'name': 'Mira', 'kind': 'fox'},
                'greedy': {
                    'nmse': 0.125,
                    'tokens': [{'text': ' Mira', 'status': 'right'}, {'text': ' foxglove', 'status': 'wrong'}],
                },
            }
        ],
    )
    page = page_of(workdir)
    assert ' before39' not in page and '… ' + ' before40' in page
    assert ' <span class="read">here</span><span class="after"> later</span>' in page
    assert '<span class="right">Mira</span> <span class="wrong">foxglove</span>' in page
    assert '<small>name</small>Mira</span>' in page and '<s class="missed">fox</s>' in page
    assert 'error 0.125' in page
    assert '<dt>Sampled</dt>' not in page and 'not picked by hand' not in page


def test_ten_samples_spread_over_the_file(workdir):
    write_lines(workdir / 'samples.jsonl', _samples(np.random.default_rng(1), 37))
    page = page_of(workdir)
    assert page.count('<article') == 10 and '10 of 37 samples' in page
    assert 'Document <bdi>10000000</bdi>,' in page and 'Document <bdi>10000036</bdi>,' in page


def test_curves_of_both_phases(workdir):
    page = page_of(workdir)
    decoder, reward = figure_of(page, 'Decoder loss'), figure_of(page, 'Reward')
    assert '>SFT</text>' in decoder and '>GRPO</text>' in decoder and 'class="phase"' in decoder
    assert decoder.count('class="line"') == 2, 'one running mean per phase'
    assert reward.count('class="line"') == 1
    fve = figure_of(page, 'Variance explained')
    assert fve.count('<circle') == 2 * 13
    boundary = float(re.search(r'class="phase" x1="([\d.]+)"', fve)[1])
    dots = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', fve)]
    assert dots[5] < boundary < dots[6], 'step 600 is the last of SFT'
    phases = report.stretches(report.load(workdir).metrics)
    assert phases == [charts.Stretch('SFT', 1, 600), charts.Stretch('GRPO', 601, 700)]


@pytest.mark.parametrize('first, every', [(0, 1), (1, 1), (0, 10), (10, 10)])
def test_phase_lengths_do_not_depend_on_how_steps_are_logged(first, every):
    metrics = [
        {'step': s, 'phase': 'sft' if s < 200 + first else 'grpo', 'kind': 'train'}
        for s in range(first, 500 + first, every)
    ]
    assert [p.steps for p in report.stretches(metrics, 500)] == [200, 300]


def test_running_mean_and_ticks():
    y = np.random.default_rng(0).normal(size=200)
    half = int(200 * charts.WINDOW / 2)
    expected = [y[max(0, i - half) : i + half + 1].mean() for i in range(200)]
    np.testing.assert_allclose(charts.running_mean(y), expected, atol=1e-12)
    np.testing.assert_allclose(charts.ticks(-0.03, 1.01, 5), [0, 0.2, 0.4, 0.6, 0.8, 1])
    np.testing.assert_allclose(charts.ticks(0, 1313, 6), np.arange(0, 1201, 200))


def test_resumed_run_counts_a_step_once_and_torn_line_is_ignored(workdir):
    records = [
        {'step': step, 'phase': 'sft', 'kind': 'train', 'loss_decoder': value}
        for step, value in ((1, 9), (2, 8), (2, 2), (3, 1))
    ]
    write_metrics(workdir, records)
    with open(workdir / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 4, "loss_dec')
    run = report.load(workdir)
    assert len(run.metrics) == 4
    points = re.search(r'class="line" points="([^"]*)"', figure_of(page_of(workdir), 'Decoder loss'))[1]
    assert len(points.split()) == 3


def test_interrupted_run_and_missing_keys(workdir):
    for name in ('evaluation.json', 'samples.jsonl', 'summary.json'):
        (workdir / name).unlink()
    records = [
        {'step': 5, 'kind': 'train', 'fve': float('nan'), 'loss_encoder': 0.5},
        {'step': 5, 'kind': 'eval', 'fve': 0.25},
    ]
    write_metrics(workdir, records)
    page = page_of(workdir)
    assert 'has not been evaluated' in page and '<p class="big">0.250</p>' in page
    assert figure_of(page, 'Encoder loss')
    assert not figure_of(page, 'Decoder loss') and not figure_of(page, 'Reward')
    (workdir / 'metrics.jsonl').write_text('')
    assert 'not logged a training step' in page_of(workdir)


@pytest.mark.parametrize(
    'name, content, said',
    [
        ('config.json', None, 'does not exist: --workdir must be'),
        ('config.json', '{"a": ', 'not valid JSON'),
        ('config.json', '{"a":' * 100_000, 'is nested more than 64 deep'),
        ('evaluation.json', '{"figures": {"fve": {"value": 1' + '0' * 400 + '}}}', 'holds a number of 401 digits'),
        ('evaluation.json', '[]', 'no JSON object'),
        ('evaluation.json', '{"step": 1}', 'figures'),
        ('evaluation.json', '{"figures": {"fve": {"ci95": null}}}', 'value'),
        ('evaluation.json', '{"figures": {}, "facts": [{"recall": 1}]}', 'field'),
        ('samples.jsonl', '{"tokens": ["a"], "read": 1}\n', 'read position 1'),
        ('samples.jsonl', '{"tokens": ["a"], "read": 0, "greedy": {"nmse": 1}}\n', 'tokens'),
        ('summary.json', '3', 'no JSON object'),
    ],
)
def test_bad_file_is_named(workdir, name, content, said):
    (workdir / name).unlink() if content is None else (workdir / name).write_text(content)
    with pytest.raises(LensError, match=re.escape(str(workdir / name))) as caught:
        report.write_report(workdir)
    assert said in str(caught.value) and '\n' not in str(caught.value)
    assert not (workdir / 'report.html').exists()


def test_damaged_lines_of_metrics_are_left_out_and_said(workdir, capsys):
    path = workdir / 'metrics.jsonl'
    page, lines = page_of(workdir), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join([*lines[:5], *(x + b'\n' for x in DAMAGED_LINES.values()), *lines[5:]]))
    assert page_of(workdir) == page
    said = f'{path} is damaged: {len(DAMAGED_LINES)} of its lines, from line 6 on, are left out'
    assert said in capsys.readouterr().out


def test_the_command(workdir):
    (workdir / 'config.json').unlink()
    argv = [sys.executable, '-m', 'lens.report', f'--workdir={workdir}']
    failed = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and 'Traceback' not in failed.stderr
    assert failed.stderr.strip().splitlines()[-1].startswith(f'error: {workdir / "config.json"} does not exist')
