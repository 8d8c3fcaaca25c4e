"""The published families: how each is recognised, read into a configuration, and laid out."""
