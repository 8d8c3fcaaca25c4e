"""Crocuta: Hyena and StripedHyena sequence models."""

__version__ = "0.1.0"
