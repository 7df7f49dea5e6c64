// Loops over the rows and columns of an activation [n_tokens, width].
#ifndef GQSA_ROWS_H
#define GQSA_ROWS_H

#include "state.h"
#include "vmath.h"

#define COLUMNS 256  // columns of one row that a share takes at a time

// Runs body for every vector of one share of [n_tokens, width], with `token`, `column` and
// `n` (elements of the row from column on, VW or more for a full vector).
#define FOR_EACH_VECTOR(n_tokens, width, share, n_shares, body)                       \
    do {                                                                                \
        const int blocks = ((width) + COLUMNS - 1) / COLUMNS;                           \
        int begin, end;                                                                 \
        split((n_tokens) * blocks, share, n_shares, &begin, &end);                    \
        for (int item = begin; item < end; item++) {                                    \
            const int token = item / blocks, start = item % blocks * COLUMNS;           \
            const int stop = min_i((width), start + COLUMNS);                           \
            for (int column = start; column < stop; column += VW) {                     \
                const int n = stop - column;                                            \
                body                                                                    \
            }                                                                           \
        }                                                                               \
    } while (0)

#endif
