"""Weights and folders on disk: safe files, the native format, foreign formats, one ``load``."""
