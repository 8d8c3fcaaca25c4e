"""Parameters and states: modules that turn ids into logits, built from a ``ModelConfig`` by ``build.build_model``.

Every mixer obeys one law: ``forward`` of a sequence equals ``extend`` of its pieces, for every way of cutting it.
"""
