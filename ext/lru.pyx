"""A weighted list of entries in order of last use; every operation but iteration takes constant time.

The links live in the entries, so a touch allocates nothing and hashes nothing. The list's dictionary owns its entries
and links are plain pointers: an entry that dies, and a list that dies, take themselves out of the chain first.
Calls are made from one thread, that of the event loop.
"""


cdef class Entry:
    """One thing in an :class:`Lru`, at most one list at a time; made to be subclassed.

    Attributes:
        key: what the list finds it by; unique within the list.
        weight: what it counts for; changed by ``Lru.reweigh`` alone.
        pins: users now at work with it; ``Lru.oldest`` passes over an entry that has any.
    """

    def __cinit__(self, *args, **fields):
        self.newer = NULL
        self.older = NULL
        self.owner = NULL

    def __init__(self, key, Py_ssize_t weight=0):
        if self.owner != NULL:
            raise ValueError("an entry in a list cannot be made anew")
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        self.key = key
        self.weight = weight

    def __dealloc__(self):
        # Reached with a list only while that list is being torn down by the collector.
        if self.owner != NULL:
            self.unlink()

    @property
    def linked(self) -> bool:
        """Whether a list holds it."""
        return self.owner != NULL

    def pin(self) -> None:
        """Count one more user."""
        self.pins += 1

    def unpin(self) -> int:
        """Count one user less and return how many are left; ValueError when there was none."""
        if self.pins == 0:
            raise ValueError(f"{self.key!r} has no pin to take back")
        self.pins -= 1
        return self.pins

    cdef void unlink(self) noexcept:
        cdef Lru owner = <Lru> self.owner
        if self.newer != NULL:
            (<Entry> self.newer).older = self.older
        else:
            owner.newest_link = self.older
        if self.older != NULL:
            (<Entry> self.older).newer = self.newer
        else:
            owner.oldest_link = self.newer
        owner.total -= self.weight
        self.newer = NULL
        self.older = NULL
        self.owner = NULL


cdef class Lru:
    """Entries from the least to the most recently used, and the sum of their weights.

    Attributes:
        total: the weights of all entries together.
    """

    def __cinit__(self):
        self.newest_link = NULL
        self.oldest_link = NULL
        self.total = 0
        self.entries = {}

    def __dealloc__(self):
        cdef void* link = self.oldest_link
        cdef Entry entry
        while link != NULL:
            entry = <Entry> link
            link = entry.newer
            entry.newer = NULL
            entry.older = NULL
            entry.owner = NULL

    cdef void put_newest(self, Entry entry) noexcept:
        entry.owner = <void*> self
        entry.newer = NULL
        entry.older = self.newest_link
        if self.newest_link != NULL:
            (<Entry> self.newest_link).newer = <void*> entry
        else:
            self.oldest_link = <void*> entry
        self.newest_link = <void*> entry

    cdef void move_newest(self, Entry entry) noexcept:
        """Touch an entry known to be in this list."""
        if entry.newer == NULL:
            return
        (<Entry> entry.newer).older = entry.older
        if entry.older != NULL:
            (<Entry> entry.older).newer = entry.newer
        else:
            self.oldest_link = entry.newer
        self.put_newest(entry)

    cdef int check_member(self, Entry entry) except -1:
        if entry.owner != <void*> self:
            raise KeyError(f"{entry.key!r} is not in this list")
        return 0

    def add(self, Entry entry not None) -> None:
        """Put a new entry at the most recently used end.

        Raises:
            KeyError: its key is taken.
            ValueError: it is in a list already.
        """
        if entry.owner != NULL:
            raise ValueError(f"{entry.key!r} is in a list already")
        if entry.key in self.entries:
            raise KeyError(f"{entry.key!r} is taken")
        self.entries[entry.key] = entry
        self.put_newest(entry)
        self.total += entry.weight

    def remove(self, Entry entry not None) -> None:
        """Take an entry out, pinned or not; KeyError when it is not in this list."""
        self.check_member(entry)
        entry.unlink()
        del self.entries[entry.key]

    def touch(self, Entry entry not None) -> None:
        """Make an entry the most recently used; KeyError when it is not in this list."""
        self.check_member(entry)
        self.move_newest(entry)

    def reweigh(self, Entry entry not None, Py_ssize_t weight) -> None:
        """Change the weight of an entry, in a list or not, its place kept.

        Raises:
            KeyError: it is in another list.
            ValueError: the weight is negative.
        """
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        if entry.owner != NULL:
            self.check_member(entry)
            self.total += weight - entry.weight
        entry.weight = weight

    def oldest(self):
        """The least recently used entry that nobody has pinned, or None.

        Pinned entries older than it are walked over: as many as are in use and were touched before it.
        """
        cdef void* link = self.oldest_link
        while link != NULL and (<Entry> link).pins > 0:
            link = (<Entry> link).newer
        return <Entry> link if link != NULL else None

    def get(self, key):
        """The entry of that key, or None; no touch."""
        return self.entries.get(key)

    def __contains__(self, key) -> bool:
        return key in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self):
        """All entries, least recently used first, as they are at this moment."""
        cdef list found = []
        cdef void* link = self.oldest_link
        while link != NULL:
            found.append(<Entry> link)
            link = (<Entry> link).newer
        return iter(found)
