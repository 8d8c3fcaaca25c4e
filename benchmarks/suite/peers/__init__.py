"""Adapters of the peers: what the others' code runs for a case. Their code itself is installed, never kept here.

Each module imports a published package (``stripedhyena``, ``vortex``, ``transformers``) or, for HyenaDNA, which is
no package, writes its published formulation anew. ``install.py`` makes their environment. Nothing of crocuta is
imported: the environment has none.
"""
