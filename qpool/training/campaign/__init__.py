"""Campaigns: many trainings at once, packed on the cores there are.

grid.py      which runs there are                 records.py  what has become of each, on disk
campaign.py  which is next, and when all is over  packing.py  how many, how long: pure
runners.py   where they are, on this machine      runner.py   the process that they have
job.py       one run, wherever it is placed       progress.py what a user's function can say
table.py     the live table                       report.py   what came of it
pace.py      how long they take                   strategy_choice.py  how each of them computes
"""

from qpool.training.campaign.campaign import Campaign
from qpool.training.campaign.progress import report as report_progress
from qpool.training.campaign.progress import run_directory

__all__ = ["Campaign", "report_progress", "run_directory"]
