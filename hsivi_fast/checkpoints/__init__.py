"""Checkpoints: their formats, ours and others', what converts and downloads them, and the folder of a run.

May import config, data and nets only.
"""
