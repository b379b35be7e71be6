"""The floors of `make demo`, and with the argument demo_data those of `make demo-data`: exit code 1 below one."""

import json
import pathlib
import sys

run = sys.argv[1] if len(sys.argv) > 1 else 'tiny'
AT_LEAST = {
    'tiny': {'fve': 0.70, 'fve_greedy': 0.78, 'facts_recall': 0.85},
    'demo_data': {'fve': 0.30},
}
AT_MOST = {
    'tiny': {'fve_shuffled': 0.0, 'fve_no_activation': 0.10, 'facts_hallucinated': 0.10},
    'demo_data': {'fve_shuffled': 0.0},
}

summary = json.loads(pathlib.Path('runs', run, 'summary.json').read_text())
failed = [f'{k} {summary[k]:.3f} < {v}' for k, v in AT_LEAST[run].items() if summary[k] < v]
failed += [f'{k} {summary[k]:.3f} > {v}' for k, v in AT_MOST[run].items() if summary[k] > v]
if run == 'tiny' and summary['fve'] - summary['fve_sft'] < 0.02:
    failed.append(f'fve - fve_sft {summary["fve"] - summary["fve_sft"]:.3f} < 0.02')
sys.exit(f'{run} below its floors: {", ".join(failed)}' if failed else print(f'{run} above its floors'))
