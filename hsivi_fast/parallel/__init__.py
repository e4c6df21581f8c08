"""The processes of a run: who is there, what they send each other, which is lost, and signals that ask it to end.

May import `config.py` alone. It knows nothing of networks, training or sampling.
"""
