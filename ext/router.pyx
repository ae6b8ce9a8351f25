"""The routing table: model name and version to the copy loaded here, with the touch of the LRU in the same call.

A registered model that is not loaded costs one :class:`Registration` and one slot of a dictionary; its files, settings
and failures are asked of its origin when they are needed. Copies are owned by the LRU's holder; the table refers to
those that may be given requests. Calls are made from one thread, that of the event loop.
"""

cimport cython
from cpython.dict cimport PyDict_GetItemWithError
from cpython.object cimport PyObject
from cpython.unicode cimport PyUnicode_GET_LENGTH

from mmcore._ext.lru cimport Entry, Lru


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

    cdef readonly str name
    cdef public tuple versions
    cdef public object origin
    cdef public dict problems
    cdef public bint withdrawn
    cdef readonly Entry here
    cdef dict copies

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

    def prefer(self, Entry entry) -> None:
        """Send the requests that name no version to ``entry``, or nowhere with None."""
        self.here = entry

    def displace(self, str version not None, Entry entry not None) -> None:
        """Send no more requests to ``entry``; nothing happens where another has taken its place."""
        if self.copies is not None and self.copies.get(version) is entry:
            del self.copies[version]
            if not self.copies:
                self.copies = None
        if self.here is entry:
            self.here = None


@cython.final
cdef class Table:
    """All registered models by name."""

    cdef dict names
    cdef Lru lru

    def __init__(self, Lru lru not None):
        self.names = {}
        self.lru = lru

    def lookup(self, str name not None, str version not None=""):
        """The copy that answers for that name and version, now the most recently used; None when there is none.

        An empty version asks for the default. An unknown name and a model that is not loaded look the same here.
        """
        cdef PyObject* found = PyDict_GetItemWithError(self.names, name)
        cdef Registration registration
        cdef Entry entry
        if found == NULL:
            return None
        registration = <Registration> found
        if PyUnicode_GET_LENGTH(version) == 0:
            entry = registration.here
        elif registration.copies is None:
            return None
        else:
            found = PyDict_GetItemWithError(registration.copies, version)
            entry = <Entry> found if found != NULL else None
        if entry is not None and entry.owner == <void*> self.lru:
            self.lru.move_newest(entry)
        return entry

    def add(self, Registration registration not None) -> None:
        """Register a model, in the place of one of the same name."""
        self.names[registration.name] = registration

    def get(self, str name not None):
        """The registration of that name, or None; no touch."""
        return self.names.get(name)

    def discard(self, str name not None) -> None:
        """Forget a model; its copies are the caller's to unload. An unknown name is no error."""
        self.names.pop(name, None)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name) -> bool:
        return name in self.names

    def __iter__(self):
        """All registrations in the order they came, as they are at this moment."""
        return iter(list(self.names.values()))
