"""A release's own program, loaded from its checked files and from nothing else.

Each loaded release has a package of its own in `sys.modules`, so that two versions of a file never
meet. Inside it `import helpers` finds the release's helpers.py, as it found the task folder's in
training. Nothing here is imported before a program is asked for: DSPy takes a second to load.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib
import json
import posixpath
import sys
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from serve.errors import ApiError
from serve.interface import Inputs
from serve.release import Release, ReleaseInvalid

LONGEST_FAULT = 300


@dataclass(frozen=True, eq=False)
class Loaded:
    """A program that can be called; its modules are let go with it."""

    task: str
    version: str
    module: Any
    """A `dspy.Module`, shared by all predictions as it was in training."""
    inputs: Inputs
    predictors: Mapping[int, str]
    """Name of each predictor, by `id`."""
    sampling: Mapping[str, Any]
    """What the teacher was asked with; the local model is asked as certified, whatever this says."""


def load(release: Release) -> Loaded:
    """Load a release's program with its state.

    Raises:
        ApiError: 501, DSPy is not installed; 502, the program's own code failed.
        ReleaseInvalid: a file is not the one that was released.
    """
    _need_dspy()
    task = release.manifest.task
    settings = yaml.safe_load(_checked(release, "task.yaml"))
    state = json.loads(_checked(release, "program.json"))
    sources = Sources(f"homestill_{uuid.uuid4().hex}", release)
    sys.meta_path.append(sources)
    try:
        module = _made(sources, settings["program"], state)
        inputs = Inputs(module, settings["inputs"])
    except BaseException as error:
        sources.forget()
        if isinstance(error, Exception):
            raise program_fault(task, error, "cannot be loaded") from error
        raise
    names = {id(predict): name for name, predict in module.named_predictors()}
    loaded = Loaded(task, release.version, module, inputs, names, _sampling(settings["teacher"], release))
    weakref.finalize(loaded, sources.forget).atexit = False
    return loaded


def program_fault(
    task: str, error: BaseException, what: str = "failed", body: Mapping[str, Any] | None = None
) -> ApiError:
    """502: the task's own code is at fault. Its error is told by type and first line, without a traceback."""
    lines = str(error).strip().splitlines()
    told = f"{type(error).__name__}: {lines[0][:LONGEST_FAULT]}" if lines else type(error).__name__
    message = (
        f"the program of {task} {what}: {told}; mend the program and release it again, or send other inputs"
    )
    fault = ApiError(502, message, kind="server_error", code="program_error")
    fault.body.update(body or {})
    return fault


class Sources(MetaPathFinder, Loader):
    """Finds and executes the Python files of one release, below a package that it alone knows.

    Args:
        package: unique in this process.
    """

    def __init__(self, package: str, release: Release) -> None:
        self.package = package
        names = [name for name in release.manifest.files if name.endswith(".py")]
        self._files = {
            _module(name): (release.folder / name, name.endswith("/__init__.py"), _checked(release, name))
            for name in names
        }
        self._tops = {name.partition(".")[0] for name in self._files} - sys.stdlib_module_names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of the package, and of what lies in it."""
        if fullname == self.package:
            return ModuleSpec(fullname, None, is_package=True)
        name = fullname.removeprefix(f"{self.package}.")
        if name == fullname:
            return None
        if name in self._files:
            file, is_package, _ = self._files[name]
            spec = spec_from_loader(fullname, self, origin=str(file), is_package=is_package)
            assert spec is not None
            spec.has_location = True
            return spec
        folder = any(other.startswith(f"{name}.") for other in self._files)
        return ModuleSpec(fullname, None, is_package=True) if folder else None

    def exec_module(self, module: ModuleType) -> None:
        """Execute a file, its absolute imports turned to its neighbours first."""
        file, _, data = self._files[module.__name__.removeprefix(f"{self.package}.")]
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
        exec(compile(data, str(file), "exec", dont_inherit=True), module.__dict__)

    def entry(self, file: str) -> ModuleType:
        """The module of a file of the release."""
        return importlib.import_module(f"{self.package}.{_module(posixpath.normpath(file))}")

    def forget(self) -> None:
        """Take everything out of the interpreter again."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name in [name for name in list(sys.modules) if name.partition(".")[0] == self.package]:
            del sys.modules[name]

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or top not in self._tops:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        inside = f"{self.package}.{name}"
        found = builtins.__import__(inside, globals, locals, fromlist or (), 0)
        return found if fromlist else sys.modules[f"{self.package}.{top}"]


def _need_dspy() -> None:
    try:
        import dspy  # noqa: F401  whether it can be
    except ModuleNotFoundError as error:
        if error.name != "dspy":
            raise
        message = "predict runs the task's DSPy program, and DSPy is not installed here; pip install 'homestill[predict]'"
        raise ApiError(501, message, kind="server_error", code="not_installed") from error


def _made(sources: Sources, program: str, state: Any) -> Any:
    """An instance of the class that task.yaml names, in the state that was released."""
    import dspy

    file, _, name = program.rpartition(":")
    kind = getattr(sources.entry(file), name)
    if not (isinstance(kind, type) and issubclass(kind, dspy.Module)):
        raise TypeError(f"{program} is no class derived from dspy.Module")
    module = kind()
    module.load_state(state)
    return module


def _sampling(teacher: Mapping[str, Any], release: Release) -> dict[str, Any]:
    """The local model's answers are cut at their certified length only if this is no less."""
    longest = max(teacher["max_tokens"], release.router.sampling.max_tokens)
    return {"temperature": teacher["temperature"], "max_tokens": longest}


def _checked(release: Release, name: str) -> bytes:
    """A file's content, held once more against the manifest: it may have changed since the release was taken up."""
    data = (release.folder / name).read_bytes()
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != release.manifest.files.get(name):
        fault = f"{release.folder / name} is not the file that was released; restore it, or roll back"
        raise ReleaseInvalid([fault])
    return data


def _module(file: str) -> str:
    """`a/b.py` as a.b, `a/__init__.py` as a."""
    return ".".join(Path(file.removesuffix(".py").removesuffix("/__init__")).parts)
