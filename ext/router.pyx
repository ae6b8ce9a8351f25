"""The routing table: model name and version to the copy loaded here, with the touch of the LRU in the same call.

A registered model that is not loaded costs one :class:`Registration`, one slot of a dictionary and two of a hash table;
its files, settings and failures are asked of its origin when they are needed. Copies are owned by the LRU's holder; the
table refers to those that may be given requests. Calls are made from one thread, that of the event loop.

The hash table is there because with many models a decision takes as long as the memory that it waits for: it leads
from a name's hash to the registration in one step, and from there to the copy in another.
"""

cimport cython
from cpython.dict cimport PyDict_GetItemWithError
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject, PyObject_Hash
from cpython.unicode cimport PyUnicode_GET_LENGTH

from mmcore._ext.lru cimport Entry, Lru

cdef enum:
    FEWEST_SLOTS = 64

# A name's hash and its registration, which the table's dictionary owns; NULL in a free slot.
cdef struct Slot:
    Py_hash_t hash
    PyObject* registration


@cython.final
cdef class Registration:
    """What the table keeps of one model.

    Attributes:
        name: what requests call it.
        versions: all that can be asked for, ascending; the last is the default. Equal tuples are shared.
        origin: gives a version's source when it is to be loaded; shared by the models of one folder.
        problems: why files were not taken, by version (the empty one for the whole model), or None.
        withdrawn: unloaded on demand, and not to be loaded by a request.
        here: the copy that answers when no version is named, or None.
    """

    cdef readonly Entry here
    cdef str here_version
    cdef readonly str name
    cdef dict copies
    cdef public tuple versions
    cdef public object origin
    cdef public dict problems
    cdef public bint withdrawn

    def __init__(self, str name not None, tuple versions not None, object origin):
        self.name = name
        self.versions = versions
        self.origin = origin

    def copy(self, str version not None):
        """The copy of that version, or None; no touch."""
        return self.copies.get(version) if self.copies is not None else None

    def loaded(self) -> dict:
        """Version to copy, of all that are here."""
        return dict(self.copies) if self.copies is not None else {}

    def place(self, str version not None, Entry entry not None) -> None:
        """Send that version's requests to ``entry`` from now on."""
        if self.copies is None:
            self.copies = {}
        self.copies[version] = entry
        if self.here_version == version:
            self.here = entry

    def prefer(self, str version not None) -> None:
        """Send the requests that name no version to the copy of that one, which has been placed; KeyError if not."""
        if self.copies is None or version not in self.copies:
            raise KeyError(f"{self.name!r} has no copy of version {version!r}")
        self.here = self.copies[version]
        self.here_version = version

    def displace(self, str version not None, Entry entry not None) -> None:
        """Send no more requests to ``entry``; nothing happens where another has taken its place."""
        if self.copies is None or self.copies.get(version) is not entry:
            return
        del self.copies[version]
        if not self.copies:
            self.copies = None
        if self.here is entry:
            self.here = None
            self.here_version = None


@cython.final
cdef class Table:
    """All registered models by name."""

    cdef dict names
    cdef Lru lru
    cdef Slot* slots
    cdef size_t mask
    cdef size_t used

    def __cinit__(self):
        self.slots = NULL

    def __init__(self, Lru lru not None):
        self.names = {}
        self.lru = lru
        self.rebuild(FEWEST_SLOTS)

    def __dealloc__(self):
        PyMem_Free(self.slots)

    cdef int rebuild(self, size_t count) except -1:
        """Lay the slots out afresh, ``count`` of them, a power of two."""
        cdef Slot* slots = <Slot*> PyMem_Calloc(count, sizeof(Slot))
        cdef Registration registration
        if slots == NULL:
            raise MemoryError
        PyMem_Free(self.slots)
        self.slots = slots
        self.mask = count - 1
        self.used = 0
        for registration in self.names.values():
            self.fill(registration)
        return 0

    cdef int fill(self, Registration registration) except -1:
        cdef Py_hash_t key = PyObject_Hash(registration.name)
        cdef size_t index = <size_t> key & self.mask
        while self.slots[index].registration != NULL:
            index = (index + 1) & self.mask
        self.slots[index] = Slot(key, <PyObject*> registration)
        self.used += 1
        return 0

    cdef Slot* find(self, str name) except? NULL:
        """The slot of a name, NULL when there is none."""
        cdef Py_hash_t key = PyObject_Hash(name)
        cdef size_t index = <size_t> key & self.mask
        cdef Slot* slot = &self.slots[index]
        while slot.registration != NULL:
            if slot.hash == key and (<Registration> slot.registration).name == name:
                return slot
            index = (index + 1) & self.mask
            slot = &self.slots[index]
        return NULL

    def lookup(self, str name not None, str version not None=""):
        """The copy that answers for that name and version, now the most recently used; None when there is none.

        An empty version asks for the default. An unknown name and a model that is not loaded look the same here.
        """
        cdef Slot* slot = self.find(name)
        cdef PyObject* found
        cdef Registration registration
        cdef Entry entry
        if slot == NULL:
            return None
        registration = <Registration> slot.registration
        entry = registration.here
        if PyUnicode_GET_LENGTH(version) != 0 and (entry is None or version != registration.here_version):
            if registration.copies is None:
                return None
            found = PyDict_GetItemWithError(registration.copies, version)
            entry = <Entry> found if found != NULL else None
        if entry is not None and entry.owner == <void*> self.lru:
            self.lru.move_newest(entry)
        return entry

    def add(self, Registration registration not None) -> None:
        """Register a model, in the place of one of the same name."""
        cdef Slot* slot = self.find(registration.name)
        if slot == NULL:
            if (self.used + 1) * 2 > self.mask + 1:
                self.rebuild((self.mask + 1) * 2)
            self.names[registration.name] = registration
            self.fill(registration)
        else:
            slot.registration = <PyObject*> registration
            self.names[registration.name] = registration

    def get(self, str name not None):
        """The registration of that name, or None; no touch."""
        return self.names.get(name)

    def discard(self, str name not None) -> None:
        """Forget a model; its copies are the caller's to unload. An unknown name is no error."""
        cdef Slot* slot = self.find(name)
        cdef size_t hole, index, home
        if slot == NULL:
            return
        hole = slot - self.slots
        index = hole
        # What lies behind it moves up, unless it would come to lie before its own place.
        while True:
            index = (index + 1) & self.mask
            if self.slots[index].registration == NULL:
                break
            home = <size_t> self.slots[index].hash & self.mask
            if ((index - home) & self.mask) >= ((index - hole) & self.mask):
                self.slots[hole] = self.slots[index]
                hole = index
        self.slots[hole].registration = NULL
        self.used -= 1
        del self.names[name]

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name) -> bool:
        return name in self.names

    def __iter__(self):
        """All registrations in the order they came, as they are at this moment."""
        return iter(list(self.names.values()))
