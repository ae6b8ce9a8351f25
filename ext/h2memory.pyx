"""Memory for nghttp2: small blocks come from free lists and go back to them.

A call makes and drops about eight small blocks in nghttp2, in bursts of a read event's calls; malloc's own cache
holds seven of a size and takes its slow path for the rest. Measured: see the commit. All callers hold the GIL.
"""

from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #ifdef __SANITIZE_ADDRESS__
    #define KEPT 0    /* AddressSanitizer is to see every block come and go */
    #else
    #define KEPT 4096 /* blocks kept of each class; 2 MiB at the most together in practice */
    #endif
    """
    const int KEPT

cdef enum:
    STEP = 32             # sizes are rounded up to this
    CLASSES = 24          # up to 768 bytes; longer blocks are malloc's
    HEADER = 16           # before each block: its class; keeps blocks aligned as malloc's are

cdef struct Block:
    size_t kind           # class, or CLASSES for one of malloc's
    size_t size           # asked for, of malloc's

cdef void *kept[CLASSES]
cdef int counts[CLASSES]


cdef void *take(size_t size, void *unused) noexcept:
    cdef size_t kind = (size + STEP - 1) // STEP
    cdef Block *block
    if kind < CLASSES:
        block = <Block *>kept[kind]
        if block != NULL:
            kept[kind] = (<void **>(<uint8_t *>block + HEADER))[0]
            counts[kind] -= 1
            return <uint8_t *>block + HEADER
        block = <Block *>malloc(HEADER + <size_t>(max(kind, <size_t>1) * STEP))
        if block == NULL:
            return NULL
        block.kind = kind
        return <uint8_t *>block + HEADER
    if size > <size_t>-1 - HEADER:
        return NULL
    block = <Block *>malloc(HEADER + size)
    if block == NULL:
        return NULL
    block.kind = CLASSES
    block.size = size
    return <uint8_t *>block + HEADER


cdef void give(void *place, void *unused) noexcept:
    cdef Block *block
    if place == NULL:
        return
    block = <Block *>(<uint8_t *>place - HEADER)
    if block.kind < CLASSES and counts[block.kind] < KEPT:
        (<void **>place)[0] = kept[block.kind]
        kept[block.kind] = block
        counts[block.kind] += 1
    else:
        free(block)


cdef void *take_zeroed(size_t count, size_t size, void *unused) noexcept:
    cdef void *place
    if size != 0 and count > <size_t>-1 // size:
        return NULL
    place = take(count * size, unused)
    if place != NULL:
        memset(place, 0, count * size)
    return place


cdef void *resize(void *place, size_t size, void *unused) noexcept:
    cdef Block *block
    cdef size_t room
    cdef void *grown
    if place == NULL:
        return take(size, unused)
    block = <Block *>(<uint8_t *>place - HEADER)
    room = max(block.kind, <size_t>1) * STEP if block.kind < CLASSES else block.size
    if size <= room and block.kind < CLASSES:
        return place
    grown = take(size, unused)
    if grown != NULL:
        memcpy(grown, place, min(room, size))
        give(place, unused)
    return grown


memory.mem_user_data = NULL
memory.malloc = take
memory.free = give
memory.calloc = take_zeroed
memory.realloc = resize
