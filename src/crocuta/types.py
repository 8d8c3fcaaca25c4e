"""The legend of axis letters, fixed library-wide, and the array aliases built from them.

| letter | axis                         | letter | axis                          |
| ------ | ---------------------------- | ------ | ----------------------------- |
| b      | batch: one row, one sequence | n      | modes of a modal filter       |
| l      | length: positions, tokens    | h      | attention heads               |
| d      | channels (hidden size)       | v      | vocabulary                    |
| g      | filter groups                | k      | taps of a finite filter       |
| i      | width inside an MLP          | e      | positional features           |

A trailing axis ``*z`` is (real, imaginary) or, for log-poles, (log modulus, angle); real modes lack it. No complex
tensor is ever a parameter or part of a state. A shape in an annotation is logical; the memory order is free unless the
docstring says otherwise.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Hidden: TypeAlias = Float[Tensor, "b l d"]
Logits: TypeAlias = Float[Tensor, "b l v"]
TokenIds: TypeAlias = Int[Tensor, "b l"]
