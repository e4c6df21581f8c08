"""What is shown of runs: pictures as PNG bytes, the page of one run, and one page about several.

May import everything but training/ and export/. Import its modules and not this door: figures.py is also used where
no sampler is needed.
"""
