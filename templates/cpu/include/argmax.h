// The largest of a row and where it first stands.
#ifndef GQSA_ARGMAX_H
#define GQSA_ARGMAX_H

#include <math.h>

#include "vmath.h"

// Index of the first of the largest, which *largest becomes. NaNs count as nothing but set *nan.
INLINE int argmax_row(const float *row, int width, float *largest, int *nan) {
    vf best = splat(-INFINITY);
    vi where = 0, strange = 0;  // where: first column of each lane that holds the lane's largest
    int column = 0;
    for (; column + VW <= width; column += VW) {
        vf value = load(row + column);
        vi larger = value > best;
        where = larger ? column + (vi)VEC_IOTA : where;
        best = larger ? value : best;
        strange |= value != value;
    }
    float max = -INFINITY;
    int first = 0, any = 0;
    for (int i = 0; i < VW; i++) {
        if (best[i] > max || (best[i] == max && where[i] < first)) max = best[i], first = where[i];
        any |= strange[i];
    }
    for (; column < width; column++) {
        if (row[column] > max) max = row[column], first = column;
        any |= row[column] != row[column];
    }
    *largest = max;
    *nan = any != 0;
    return first;
}

#endif
