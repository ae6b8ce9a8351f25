"""A weighted list of entries in order of last use; every operation but iteration takes constant time.

The links live in the entries, so a touch allocates nothing and hashes nothing. The list's dictionary owns its entries
and links are plain pointers: an entry that dies, and a list that dies, take themselves out of the chain first.
Calls are made from one thread, that of the event loop.
"""

# Where the link lies in an entry; the same for all subclasses, which come after it.
cdef Py_ssize_t LINK_AT = 0


cdef inline Entry holder(Link* link):
    """The entry that a link belongs to."""
    return <Entry> <void*> (<char*> link - LINK_AT)


cdef inline void unlink(Entry entry) noexcept:
    cdef Lru lru = <Lru> entry.owner
    lru.total -= entry.weight
    if entry.pins:
        lru.pinned -= entry.weight
    entry.link.newer.older = entry.link.older
    entry.link.older.newer = entry.link.newer
    entry.link.newer = NULL
    entry.link.older = NULL
    entry.owner = NULL


cdef class Entry:
    """One thing in an :class:`Lru`, at most one list at a time; made to be subclassed.

    Attributes:
        key: what the list finds it by; unique within the list.
        weight: what it counts for; changed by ``Lru.reweigh`` alone.
        pins: users now at work with it; ``Lru.oldest`` passes over an entry that has any.
        uses: how often it has been touched since it was added.
        used_at: what ``Lru.now`` was when it was last touched; before the first touch, what it was added with.
    """

    def __cinit__(self, *args, **fields):
        self.link.newer = NULL
        self.link.older = NULL
        self.owner = NULL
        global LINK_AT
        LINK_AT = <char*> &self.link - <char*> <void*> self

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
            unlink(self)

    @property
    def linked(self) -> bool:
        """Whether a list holds it."""
        return self.owner != NULL

    def pin(self) -> None:
        """Count one more user."""
        if self.pins == 0 and self.owner != NULL:
            (<Lru> self.owner).pinned += self.weight
        self.pins += 1

    def unpin(self) -> int:
        """Count one user less and return how many are left; ValueError when there was none."""
        if self.pins == 0:
            raise ValueError(f"{self.key!r} has no pin to take back")
        self.pins -= 1
        if self.pins == 0 and self.owner != NULL:
            (<Lru> self.owner).pinned -= self.weight
        return self.pins


cdef class Lru:
    """Entries from the least to the most recently used, and the sum of their weights.

    Attributes:
        total: the weights of all entries together.
        pinned: of those, the weights of entries that are in use.
        now: the time that entries are marked with when they are touched, in the holder's units; the holder moves it on.
    """

    def __cinit__(self):
        self.ends.newer = &self.ends
        self.ends.older = &self.ends
        self.total = 0
        self.pinned = 0
        self.entries = {}

    def __dealloc__(self):
        cdef Link* link = self.ends.newer
        cdef Link* following
        while link != &self.ends:
            following = link.newer
            link.newer = NULL
            link.older = NULL
            holder(link).owner = NULL
            link = following

    cdef void put_newest(self, Link* link) noexcept:
        link.newer = &self.ends
        link.older = self.ends.older
        self.ends.older.newer = link
        self.ends.older = link

    cdef void move_newest(self, Entry entry) noexcept:
        """Touch an entry known to be in this list."""
        cdef Link* link = &entry.link
        entry.uses += 1
        entry.used_at = self.now
        link.newer.older = link.older
        link.older.newer = link.newer
        self.put_newest(link)

    cdef int check_member(self, Entry entry) except -1:
        if entry.owner != <void*> self:
            raise KeyError(f"{entry.key!r} is not in this list")
        return 0

    cdef void put_at_its_time(self, Entry entry) noexcept:
        """Put a new entry behind all that were used before it or at the same time; those older are walked over."""
        cdef Link* link = &entry.link
        cdef Link* newer = self.ends.newer
        while newer != &self.ends and holder(newer).used_at <= entry.used_at:
            newer = newer.newer
        link.newer = newer
        link.older = newer.older
        newer.older.newer = link
        newer.older = link

    def add(self, Entry entry not None, used_at=None) -> None:
        """Put a new entry at the most recently used end, or to those last used when it was, at ``used_at``.

        Raises:
            KeyError: its key is taken.
            ValueError: it is in a list already.
        """
        if entry.owner != NULL:
            raise ValueError(f"{entry.key!r} is in a list already")
        if entry.key in self.entries:
            raise KeyError(f"{entry.key!r} is taken")
        self.entries[entry.key] = entry
        entry.owner = <void*> self
        entry.uses = 0
        if used_at is None:
            entry.used_at = self.now
            self.put_newest(&entry.link)
        else:
            entry.used_at = used_at
            self.put_at_its_time(entry)
        self.total += entry.weight
        if entry.pins:
            self.pinned += entry.weight

    def remove(self, Entry entry not None) -> None:
        """Take an entry out, pinned or not; KeyError when it is not in this list."""
        self.check_member(entry)
        unlink(entry)
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
            if entry.pins:
                self.pinned += weight - entry.weight
        entry.weight = weight

    def oldest(self):
        """The least recently used entry that nobody has pinned, or None.

        Pinned entries older than it are walked over: as many as are in use and were touched before it.
        """
        cdef list found = self.oldest_of(1)
        return found[0] if found else None

    def oldest_of(self, Py_ssize_t count) -> list:
        """Up to so many of the least recently used entries that nobody has pinned, the oldest first."""
        cdef list found = []
        cdef Link* link = self.ends.newer
        while link != &self.ends and len(found) < count:
            if holder(link).pins == 0:
                found.append(holder(link))
            link = link.newer
        return found

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
        cdef Link* link = self.ends.newer
        while link != &self.ends:
            found.append(holder(link))
            link = link.newer
        return iter(found)
