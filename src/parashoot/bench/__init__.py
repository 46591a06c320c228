"""`parashoot bench`: times with an error against the fp64 for-loop in every row.

cases.py (what is run, in suites), contest.py (who runs it, judged by what), ours.py and peers.py (the contestants), timing.py,
run.py (suites -> results file), results.py (results file -> tables and plots).
"""
