"""Synthetic tasks, and `parashoot tasks`, which trains small models on them.

task.py (what a task is), recall.py, tracking.py, formal.py (the tasks); models.py, suite.py (what is trained), run.py (suite ->
results file), report.py (results file -> tables and plots), command.py (the command line). What trains needs `parashoot.lm`.
"""

from .formal import arithmetic, brackets, dyck
from .recall import keep_nth, khop, mqar, selective_copy
from .task import IGNORED, Samples, Task, find_task, rates, tally
from .tracking import a5, cycle, parity, s3, s5, z60

TASKS: dict[str, Task] = {
    task.name: task
    for task in (keep_nth, parity, mqar, khop, selective_copy, cycle, arithmetic, brackets, z60, s3, s5, a5, dyck)
}
