"""`parashoot bench`: times with an error against the fp64 for-loop in every row.

cases.py (what is run), trial.py (how it is compared and timed), contestants.py (who runs it), run.py (suites -> results
file), results.py (results file -> tables and plots).
"""
