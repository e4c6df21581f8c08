"""Training: the distillation from `trainer.train` down, and the pre-training of small teachers and feature networks.

May import every other room of the package; nothing but `cli.py` and the public names import it.
"""
