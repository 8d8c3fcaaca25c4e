"""Files to batches: ``fasta`` and ``text`` read, ``prepare`` and ``megatron`` store, ``windows`` and ``loader`` feed.

All of it is numpy and the standard library; nothing here imports torch.
"""
