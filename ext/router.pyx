"""The routing table: model name and version to the copy loaded here, with the touch of the LRU in the same call.

A registered model that is not loaded costs one :class:`Registration`, one slot of a dictionary and two of a hash table;
its files, settings and failures are asked of its origin when they are needed. Copies are owned by the LRU's holder; the
table refers to those that may be given requests. Calls are made from one thread, that of the event loop.

The hash table is there because with many models a decision takes as long as the memory that it waits for: it leads
from a name's hash to the registration in one step, and from there to the copy in another. An alias is a slot of its own
that leads to another name's registration, so that it costs a request nothing, neither one that uses it nor any other.
"""

cimport cython
from cpython.dict cimport PyDict_GetItemWithError
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.object cimport PyObject, PyObject_Hash
from cpython.unicode cimport PyUnicode_GET_LENGTH

from mmcore._ext.lru cimport Entry, Lru

cdef enum:
    FEWEST_SLOTS = 64

# A name, its hash and what it leads to, both objects owned by the table's dictionaries; NULL in a free slot.
cdef struct Slot:
    Py_hash_t hash
    PyObject* name
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
    cdef set aliases

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
    cdef dict aliases
    cdef dict elsewhere
    cdef Lru lru
    cdef Slot* slots
    cdef size_t mask
    cdef size_t used

    def __cinit__(self):
        self.slots = NULL

    def __init__(self, Lru lru not None):
        self.names = {}
        self.aliases = {}
        self.elsewhere = {}
        self.lru = lru
        self.rebuild(FEWEST_SLOTS)

    def __dealloc__(self):
        PyMem_Free(self.slots)

    cdef int rebuild(self, size_t count) except -1:
        """Lay the slots out afresh, ``count`` of them, a power of two."""
        cdef Slot* slots = <Slot*> PyMem_Calloc(count, sizeof(Slot))
        cdef Registration registration
        cdef str name
        if slots == NULL:
            raise MemoryError
        PyMem_Free(self.slots)
        self.slots = slots
        self.mask = count - 1
        self.used = 0
        for registration in self.names.values():
            if registration.name not in self.aliases:
                self.fill(registration.name, registration)
        for name, registration in self.aliases.items():
            self.fill(name, registration)
        return 0

    cdef int fill(self, str name, Registration registration) except -1:
        """Take a free slot; ``name`` must be the object that the table owns."""
        cdef Py_hash_t key = PyObject_Hash(name)
        cdef size_t index = <size_t> key & self.mask
        while self.slots[index].registration != NULL:
            index = (index + 1) & self.mask
        self.slots[index] = Slot(key, <PyObject*> name, <PyObject*> registration)
        self.used += 1
        return 0

    cdef int lead(self, str name, Registration registration) except -1:
        """Lead a name to a registration, in a new slot or its own; ``name`` as for :meth:`fill`."""
        cdef Slot* slot = self.find(name)
        if slot != NULL:
            slot.name = <PyObject*> name
            slot.registration = <PyObject*> registration
            return 0
        if (self.used + 1) * 2 > self.mask + 1:
            # It is laid out with all that the dictionaries hold, this name among them.
            return self.rebuild((self.mask + 1) * 2)
        return self.fill(name, registration)

    cdef void free(self, Slot* slot) noexcept:
        cdef size_t hole = slot - self.slots
        cdef size_t index = hole
        cdef size_t home
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

    cdef Slot* find(self, str name) except? NULL:
        """The slot of a name, NULL when there is none."""
        cdef Py_hash_t key = PyObject_Hash(name)
        cdef size_t index = <size_t> key & self.mask
        cdef Slot* slot = &self.slots[index]
        while slot.registration != NULL:
            if slot.hash == key and <str> slot.name == name:
                return slot
            index = (index + 1) & self.mask
            slot = &self.slots[index]
        return NULL

    def lookup(self, str name not None, str version not None=""):
        """The copy that answers for that name and version, now the most recently used; None when there is none.

        An alias goes before a model of the same name. An empty version asks for the default. An unknown name and a
        model that is not loaded look the same here.
        """
        cdef Slot* slot = self.find(name)
        return self.answering(<Registration> slot.registration, version) if slot != NULL else None

    def lookup_model(self, str name not None, str version not None=""):
        """The same for the model of that name, whatever alias is called so too."""
        cdef PyObject* found = PyDict_GetItemWithError(self.names, name)
        return self.answering(<Registration> found, version) if found != NULL else None

    cdef inline object answering(self, Registration registration, str version):
        cdef PyObject* found
        cdef Entry entry = registration.here
        if PyUnicode_GET_LENGTH(version) != 0 and (entry is None or version != registration.here_version):
            if registration.copies is None:
                return None
            found = PyDict_GetItemWithError(registration.copies, version)
            entry = <Entry> found if found != NULL else None
        if entry is not None and entry.owner == <void*> self.lru:
            self.lru.move_newest(entry)
        return entry

    def holders(self, str name not None):
        """The peers that hold a copy of the model of that name, as :meth:`hold` was told; empty where it was not."""
        cdef PyObject* found = PyDict_GetItemWithError(self.elsewhere, name)
        return <tuple> found if found != NULL else ()

    def hold(self, str name not None, tuple holders not None) -> None:
        """Note which peers hold a copy of a model, registered here or not; an empty tuple takes no memory."""
        if holders:
            self.elsewhere[name] = holders
        else:
            self.elsewhere.pop(name, None)

    def add(self, Registration registration not None) -> None:
        """Register a model, in the place of one of the same name, whose aliases lead to it from now on."""
        cdef str name = registration.name
        cdef Registration before = self.names.get(name)
        self.names[name] = registration
        if name not in self.aliases:
            self.lead(name, registration)
        if before is not None and before is not registration and before.aliases is not None:
            for name in list(before.aliases):
                self.alias(name, registration)

    def get(self, str name not None):
        """The registration of that name, or None; no touch."""
        return self.names.get(name)

    def discard(self, str name not None) -> None:
        """Forget a model and its aliases; its copies are the caller's to unload. An unknown name is no error."""
        cdef Registration registration = self.names.get(name)
        cdef str alias
        if registration is None:
            return
        if registration.aliases is not None:
            for alias in list(registration.aliases):
                self.unalias(alias)
        if name not in self.aliases:
            self.free(self.find(name))
        del self.names[name]

    def alias(self, str name not None, Registration registration not None) -> None:
        """Have :meth:`lookup` answer for that name what it answers for the registration's, which has been added."""
        cdef Registration before = self.aliases.get(name)
        if before is not None:
            before.aliases.discard(name)
        self.aliases[name] = registration
        if registration.aliases is None:
            registration.aliases = set()
        registration.aliases.add(name)
        if before is not None:
            # The slot keeps the string that the dictionary keeps.
            self.find(name).registration = <PyObject*> registration
        else:
            self.lead(name, registration)

    def unalias(self, str name not None) -> None:
        """Take an alias back, so that a model of that name answers again. An unknown one is no error."""
        cdef Registration registration = self.aliases.get(name)
        cdef Registration model
        if registration is None:
            return
        registration.aliases.discard(name)
        model = self.names.get(name)
        if model is not None:
            self.lead(model.name, model)
        else:
            self.free(self.find(name))
        del self.aliases[name]

    def aliased(self, str name not None):
        """The registration that an alias leads to, or None."""
        return self.aliases.get(name)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name) -> bool:
        return name in self.names

    def __iter__(self):
        """All registrations in the order they came, as they are at this moment."""
        return iter(list(self.names.values()))
