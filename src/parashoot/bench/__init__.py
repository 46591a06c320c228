"""Benchmarks with an agreement error in every row: `parashoot bench`.

case.py (what is run), contest.py (who runs it and by what truth it is judged), ours.py and peers.py (the contestants),
agreement.py, timing.py, measure.py (the numbers), suites.py (which cases), rows.py (results file and table), render.py and plot.py
(a README block and plots), command.py (all of it in order).
"""
