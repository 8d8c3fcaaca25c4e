"""Other implementations of ops, under the names of the ops: compiled ones for the CPU (``cpp``).

The readable torch implementation beside them is the oracle, and what runs where there is no compiled library.
"""
