// Memory of large results and of what kernels work in, kept for the next ones (memory.cpp).
#pragma once

#include <cstddef>

struct Piece {
  char* at;
  size_t size;
};

// At least ``bytes``, on a border of 2 MiB and in pages of that size where the system has them, holding any values.
// Throws std::bad_alloc.
Piece take_memory(size_t bytes);
void give_memory(Piece piece);
