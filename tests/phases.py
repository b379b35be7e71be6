"""Phases of training by hand, on the tiny world."""

from configs.base import table
from lens import objectives, optimizer
from lens.config import Phase
from lens.schedules import Units, constant
from tests.tiny_world import LAYER, LENGTH

ROWS = optimizer.parse_table(table(weight_decay=0.01), Units(), 'table')
RATES = {'decoder': 1e-3, 'encoder': 2e-3}


def phase_of(
    objective: str,
    *,
    start: int = 0,
    steps: int = 10,
    weights: dict | None = None,
    rates: dict | None = None,
    documents: int = 8,
    vectors: int = 2,
    clip_norm: float = 1.0,
    **hparams,
) -> Phase:
    """weights: of the terms that are on, mse_weight=1 without; hparams: what the program depends on, as in Hparams."""
    values = dict.fromkeys(objectives.KNOBS, 0.0) | {'mse_weight': 1.0, 'tau': 1.0, 'entropy_clamp': 9.0}
    values |= weights or {}
    on = frozenset(k for k, v in values.items() if v)
    return Phase(
        name=objective,
        start=start,
        end=start + steps,
        objective=objectives.OBJECTIVES[objective],
        hparams=objectives.Hparams(**{'layer': LAYER, 'length': LENGTH, 'on': on} | hparams),
        tx=optimizer.make(ROWS),
        documents=documents,
        vectors=vectors,
        schedules={k: constant(v) for k, v in values.items()},
        rates={k: constant(v) for k, v in (rates or RATES).items()},
        table=ROWS,
        clip_norms=dict.fromkeys(optimizer.SIDES, clip_norm),
        clip=0.2,
    )
