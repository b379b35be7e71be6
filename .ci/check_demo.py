"""The floors of `make demo`: exit code 1 when runs/tiny/summary.json misses one."""

import json
import pathlib
import sys

AT_LEAST = {'fve': 0.70, 'fve_greedy': 0.78, 'facts_recall': 0.85}
AT_MOST = {'fve_shuffled': 0.0, 'fve_no_activation': 0.10, 'facts_hallucinated': 0.10}

summary = json.loads(pathlib.Path('runs/tiny/summary.json').read_text())
failed = [f'{k} {summary[k]:.3f} < {v}' for k, v in AT_LEAST.items() if summary[k] < v]
failed += [f'{k} {summary[k]:.3f} > {v}' for k, v in AT_MOST.items() if summary[k] > v]
if summary['fve'] - summary['fve_sft'] < 0.02:
    failed.append(f'fve - fve_sft {summary["fve"] - summary["fve_sft"]:.3f} < 0.02')
sys.exit(f'demo below its floors: {", ".join(failed)}' if failed else print('demo above its floors'))
