"""What a schedule loses at other numbers of steps than it was made for; and whether it fits another resolution.

    python examples/explore/transfer.py -o out/transfer
    python examples/explore/transfer.py -o out/transfer --schedule out/search/front.json --pick 2.5x

The yardsticks are a schedule made for that number of steps, and plain steps, of the same compute.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from dataclasses import replace
from pathlib import Path

from dcc.commands.terminal import print_table
from dcc.frontend.dit import DiT, DiTConfig
from dcc.frontend.schedules import read_schedule, transfer
from dcc.ir.measurements import subject_of
from dcc.ir.schedule import Schedule
from dcc.passes.optimal_steps import OptimalSteps
from dcc.preparation import Source, prepare
from dcc.search.assess import PlainSteps, computed_share
from dcc.search.fitting import fit_weights
from dcc.search.front import Front, pick
from dcc.search.laboratory import Laboratory
