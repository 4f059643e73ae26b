"""A text classification task that every machine with Python has: docstrings of the standard library, labelled by its parts.

No download, no licence question, and real prose by many hands. Only modules that are in every Python from 3.11 to 3.13 are named;
tkinter and other windows, and the media modules that 3.13 dropped, are not. A module that this machine lacks (``fcntl``
outside Unix, ``sqlite3`` in some builds) is passed over.

Two things would make the task easier than it looks, and are prevented here:

* an object seen twice, once to learn from and once to be tested on. Objects are compared after unwrapping and by normalised text,
  a text that occurs in two parts has no right label and is left out of both, and no object is listed in two implementations
  (decimal and _pydecimal);
* the text that names its own module. Every name of a listed module is taken out of every text, whatever its part: taking out only
  the text's own would tell the label by the gap.
"""

import functools
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

PARTS: dict[str, tuple[str, ...]] = {
    "text and markup": (
        *("string", "re", "difflib", "textwrap", "unicodedata", "stringprep", "codecs", "gettext", "locale", "html"),
        *(
            "html.parser",
            "xml.dom",
            "xml.dom.minidom",
            "xml.dom.pulldom",
            "xml.dom.expatbuilder",
            "xml.etree.ElementTree",
        ),
        *("xml.sax", "xml.sax.handler", "xml.sax.saxutils", "xml.sax.xmlreader", "xml.sax.expatreader"),
        *("xml.parsers.expat", "encodings.idna", "encodings.utf_8_sig", "encodings.punycode"),
    ),
    "data formats": (
        *("json", "json.decoder", "json.encoder", "csv", "configparser", "tomllib", "plistlib", "netrc", "pickle"),
        *("pickletools", "copyreg", "shelve", "marshal", "dbm", "dbm.dumb", "sqlite3", "struct", "base64", "binascii"),
        *("quopri", "zlib", "gzip", "bz2", "lzma", "zipfile", "tarfile", "hashlib", "hmac", "secrets"),
    ),
    "networking": (
        *("socket", "ssl", "socketserver", "http", "http.client", "http.server", "http.cookies", "http.cookiejar"),
        *(
            "urllib.error",
            "urllib.parse",
            "urllib.request",
            "urllib.response",
            "urllib.robotparser",
            "ftplib",
            "poplib",
        ),
        *("imaplib", "smtplib", "xmlrpc.client", "xmlrpc.server", "ipaddress", "wsgiref.handlers", "wsgiref.headers"),
        *("wsgiref.simple_server", "wsgiref.util", "wsgiref.validate", "webbrowser"),
    ),
    "mail": (
        *("mailbox", "email", "email.charset", "email.contentmanager", "email.encoders", "email.errors"),
        *("email.feedparser", "email.generator", "email.header", "email.headerregistry", "email.iterators"),
        *("email.message", "email.parser", "email.policy", "email.utils", "email.mime.base", "email.mime.text"),
        *("email._header_value_parser", "email._policybase", "mimetypes"),
    ),
    "concurrency": (
        *("threading", "multiprocessing.connection", "multiprocessing.context", "multiprocessing.managers"),
        *("multiprocessing.pool", "multiprocessing.process", "multiprocessing.queues", "multiprocessing.shared_memory"),
        *("multiprocessing.sharedctypes", "multiprocessing.synchronize", "multiprocessing.util", "subprocess", "queue"),
        *("concurrent.futures", "concurrent.futures.thread", "concurrent.futures.process", "sched", "contextvars"),
        *("asyncio.base_events", "asyncio.events", "asyncio.futures", "asyncio.locks", "asyncio.protocols"),
        *("asyncio.queues", "asyncio.runners", "asyncio.streams", "asyncio.subprocess", "asyncio.taskgroups"),
        *("asyncio.tasks", "asyncio.timeouts", "asyncio.transports", "asyncio.unix_events", "asyncio.selector_events"),
        *("asyncio.sslproto", "select", "selectors", "signal"),
    ),
    "files and the system": (
        *(
            "os",
            "posixpath",
            "ntpath",
            "pathlib",
            "shutil",
            "glob",
            "fnmatch",
            "tempfile",
            "filecmp",
            "fileinput",
            "stat",
        ),
        *("io", "mmap", "fcntl", "linecache", "platform", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog"),
        *("getpass", "errno", "sys", "readline", "zipapp"),
    ),
    "numbers and dates": (
        *(
            "math",
            "cmath",
            "decimal",
            "fractions",
            "random",
            "statistics",
            "numbers",
            "datetime",
            "calendar",
        ),
        *("time", "zoneinfo", "colorsys"),
    ),
    "containers and functions": (
        *(
            "collections",
            "collections.abc",
            "heapq",
            "bisect",
            "array",
            "enum",
            "dataclasses",
            "functools",
            "itertools",
        ),
        *("operator", "graphlib", "copy", "pprint", "reprlib", "weakref", "contextlib", "types", "ctypes", "uuid"),
    ),
    "language and introspection": (
        *("ast", "dis", "inspect", "tokenize", "token", "typing", "symtable", "importlib", "importlib.abc"),
        *(
            "importlib.machinery",
            "importlib.metadata",
            "importlib.resources",
            "importlib.resources.abc",
            "importlib.util",
        ),
        *(
            "importlib._bootstrap",
            "importlib._bootstrap_external",
            "pkgutil",
            "abc",
            "code",
            "codeop",
            "gc",
            "traceback",
        ),
        *(
            "runpy",
            "modulefinder",
            "pyclbr",
            "py_compile",
            "compileall",
            "zipimport",
            "keyword",
            "atexit",
            "faulthandler",
        ),
    ),
    "development tools": (
        *("unittest", "unittest.case", "unittest.loader", "unittest.main", "unittest.mock", "unittest.result"),
        *(
            "unittest.runner",
            "unittest.suite",
            "unittest.util",
            "unittest.async_case",
            "doctest",
            "pdb",
            "bdb",
            "cProfile",
        ),
        *("profile", "pstats", "timeit", "trace", "tracemalloc", "logging", "logging.config", "logging.handlers"),
        *("argparse", "optparse", "getopt", "cmd", "warnings", "venv", "pydoc", "sysconfig", "tabnanny", "rlcompleter"),
    ),
}
LABELS = tuple(PARTS)

# One text in five is held out. The hash is of the text itself, so the same docstring falls on the same side whatever else a
# Python version adds, and Python's own salted hash has no say.
HELD_OUT_ONE_IN = 5
SHORTEST_WORDS = 5
LONGEST_CHARACTERS = 1200

_DESCRIPTORS = (
    types.BuiltinFunctionType,
    types.FunctionType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    functools.cached_property,
    property,
    type,
)


@dataclass(frozen=True)
class Example:
    """One docstring: where it comes from, its text without names of modules, and the index of its part in ``LABELS``."""

    name: str
    text: str
    label: int

    @property
    def held_out(self) -> bool:
        """Whether the example belongs to the test side; a function of its normalised text alone."""
        digest = hashlib.sha256(normalise(self.text).encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def normalise(text: str) -> str:
    """The text by which two docstrings count as one: lower case words, no digits, punctuation or layout."""
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


@functools.cache
def _module_names() -> re.Pattern[str]:
    names = {part for modules in PARTS.values() for module in modules for part in (module, *module.split("."))}
    names = {name.lstrip("_") for name in names} - {"", "text"}
    # Longest first, so that "os.path"-like names go whole.
    return re.compile(r"\b_?(?:" + "|".join(sorted(map(re.escape, names), key=lambda n: (-len(n), n))) + r")\b", re.I)


def clean(docstring: str) -> str:
    """The docstring on one line, without the names of the listed modules, at most ``LONGEST_CHARACTERS`` characters."""
    text = _module_names().sub(" ", inspect.cleandoc(docstring))
    return " ".join(text.split())[:LONGEST_CHARACTERS].rstrip()


def _unwrap(value: Any) -> Any:
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    return inspect.unwrap(value) if isinstance(value, types.FunctionType) else value


def _members(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The module, then its own public classes and functions with their methods, sorted by name."""
    yield module.__name__, module
    listed = getattr(module, "__all__", None)
    for name in sorted(vars(module)):
        value = vars(module)[name]
        if name.startswith("_") or not isinstance(value, _DESCRIPTORS):
            continue
        # A name that __all__ lists is the module's even where C defines it elsewhere (os.open is posix.open).
        if getattr(value, "__module__", None) != module.__name__ and (listed is None or name not in listed):
            continue
        yield f"{module.__name__}.{name}", _unwrap(value)
        if isinstance(value, type):
            for attribute in sorted(vars(value)):
                member = _unwrap(vars(value)[attribute])
                if isinstance(member, _DESCRIPTORS):
                    yield f"{module.__name__}.{name}.{attribute}", member


def _import(name: str) -> types.ModuleType | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def collect() -> list[Example]:
    """All examples in a fixed order: 3,000 or more on Python 3.11 to 3.13, none twice, none whose text fits two parts.

    A fresh interpreter looks for them: what this process has imported shows in the standard library (torch exchanges
    inspect.getfile, pytest threading.excepthook, concurrent.futures has its classes once someone asked), and so does python -OO.
    """
    command = [sys.executable, "-I", "-S", "-B", __file__]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return [Example(*row) for row in json.loads(done.stdout)]


def collect_here() -> list[Example]:
    """As :func:`collect`, in this process."""
    found: list[tuple[Example, str]] = []
    parts_of_text: dict[str, set[int]] = {}
    seen: set[int] = set()
    keep_alive: list[Any] = []
    for label, modules in enumerate(PARTS.values()):
        for module_name in modules:
            module = _import(module_name)
            if module is None:
                continue
            for name, value in _members(module):
                with warnings.catch_warnings():
                    # typing.io and typing.re of Python 3.11 warn when they are looked at.
                    warnings.simplefilter("ignore")
                    docstring = getattr(value, "__doc__", None)
                if id(value) in seen or not isinstance(docstring, str):
                    continue
                seen.add(id(value))
                keep_alive.append(value)
                text = clean(docstring)
                key = normalise(text)
                if len(key.split()) < SHORTEST_WORDS:
                    continue
                parts_of_text.setdefault(key, set()).add(label)
                found.append((Example(name, text, label), key))
    examples = []
    taken: set[str] = set()
    for example, key in found:
        if len(parts_of_text[key]) == 1 and key not in taken:
            taken.add(key)
            examples.append(example)
    return examples


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(to learn from, held out), each in the order given."""
    return [e for e in examples if not e.held_out], [e for e in examples if e.held_out]


if __name__ == "__main__":
    print(json.dumps([(e.name, e.text, e.label) for e in collect_here()]))
