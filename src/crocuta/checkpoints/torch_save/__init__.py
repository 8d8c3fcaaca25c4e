"""Files of ``torch.save``, read lazily and without executing anything that they name."""
