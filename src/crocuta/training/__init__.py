"""Training runs: a ``TrainConfig`` and data in, a run folder with a model out (``loop.train``)."""
