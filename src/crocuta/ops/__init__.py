"""Maths: pure functions on tensors, without parameters and without configuration.

``reference`` is the specification, one naive loop per op; every other implementation is judged against it.
Shapes are logical ``[b l d]``; the memory order is free. The torch kernels run fastest when time is contiguous
(a ``[d b l]`` tensor seen through ``permute``), which is what ``project`` in ``model/hyena.py`` produces for free.
"""
